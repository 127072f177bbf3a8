"""How a model that decodes is spread over devices: each step reads all weights, so none should be fetched first."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from s1jax.config import DecodingMeshSection
from s1jax.device_memory import GIB, limit_bytes
from s1jax.mesh import MESH_AXES, MeshError, device_bytes
from s1jax.model.qwen import Qwen

_WORTH_DIVIDING = 2 * GIB
"""Weights on a device: fewer are read in about the time that the exchanges of a further division take."""
_MOST_OF_MEMORY = 0.8
"""That weights may take; the rest is for caches."""


class Machine(NamedTuple):
    """The devices that a model may be spread over."""

    devices: int
    devices_per_host: int
    """That reach each other over the fast links."""
    memory: int | None
    """Bytes of each; None where it is not known."""


def machine_of(devices: Sequence[jax.Device]) -> Machine:
    """What is known of devices that are here; those of a TPU's slice all reach each other over its links."""
    first = devices[0]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    hosts = slices if first.platform == "tpu" else len({device.process_index for device in devices})
    memory = limit_bytes(jax.local_devices()[0])
    return Machine(len(devices), len(devices) // hosts, memory)


class MeshSizes(NamedTuple):
    """Of the mesh's axes, at most one of them -1."""

    data: int
    fsdp: int
    tensor: int


def decoding_mesh_sizes(section: DecodingMeshSection, model: Qwen, machine: Machine) -> MeshSizes:
    """The sizes that the section gives, and the best for those that it leaves open. `make_mesh` refuses what cannot be.

    Heads and feed-forward are divided inside a host as long as that saves more reading than it costs in exchanges, and
    further, across hosts too, only if the weights have no room otherwise; the other devices get copies. Where even that
    leaves no room, shards of weights are gathered at each step.
    """
    data, fsdp, tensor = section.data, section.fsdp, section.tensor
    given = MeshSizes(*(1 if size is None else size for size in (data, fsdp, tensor)))
    if given.fsdp < 1 or given.tensor < 1:
        return given
    room = machine.devices // (max(given.data, 1) * given.fsdp)
    if tensor is None:
        tensor = _tensor(model, room, machine)
    if fsdp is None:
        left = 1 if data is not None else max(room // tensor, 1)
        shards = [size for size in range(1, left + 1) if left % size == 0]
        fsdp = next((size for size in shards if _fits(model, MeshSizes(1, size, tensor), machine)), left)
    return MeshSizes(-1 if data is None else data, fsdp, tensor)


def _tensor(model: Qwen, room: int, machine: Machine) -> int:
    """Of the sizes that divide `room` and the model, the best."""
    sizes = [
        size
        for size in range(1, room + 1)
        if room % size == 0 and _weight_bytes(model, MeshSizes(1, 1, size)) is not None
    ]
    # Heads of keys and values fewer than that would be copied, and the cache with them.
    inside = [s for s in sizes if machine.devices_per_host % s == 0 and s <= model.config.num_key_value_heads]
    enough = [s for s in inside if (_weight_bytes(model, MeshSizes(1, 1, s)) or 0) <= _WORTH_DIVIDING]
    best = min(enough, default=max(inside, default=1))
    fitting = [s for s in sizes if s >= best and _fits(model, MeshSizes(1, 1, s), machine)]
    return min(fitting, default=max(sizes, default=1))


def _fits(model: Qwen, sizes: MeshSizes, machine: Machine) -> bool:
    weights = _weight_bytes(model, sizes)
    return weights is not None and (machine.memory is None or weights <= _MOST_OF_MEMORY * machine.memory)


def _weight_bytes(model: Qwen, sizes: MeshSizes) -> int | None:
    """On each device; None where a dimension is not divided by the mesh."""
    try:
        return device_bytes(model.abstract_params(AbstractMesh(tuple(sizes), MESH_AXES)))
    except MeshError:
        return None


def described(section: DecodingMeshSection, model: Qwen, sizes: MeshSizes) -> str:
    """One line on a mesh of these sizes, none of which is -1: what each device has, and what it lacks at each step."""
    weights = _weight_bytes(model, sizes) or 0
    given = {axis: getattr(section, axis) for axis in MESH_AXES}
    axes = (f"{axis} {size}" + " (chosen)" * (given[axis] is None) for axis, size in zip(MESH_AXES, sizes, strict=True))
    text = f"mesh: {' x '.join(axes)}; {weights / GIB:.2f} GiB of weights a device"
    if sizes.fsdp > 1:
        text += (
            f", and each step gathers {(sizes.fsdp - 1) * weights / GIB:.2f} GiB more from the others: "
            "mesh.fsdp=1 gathers none, if it fits"
        )
    return text
