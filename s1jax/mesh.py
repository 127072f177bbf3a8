"""The device mesh and the one table that maps logical axes of arrays to its axes.

Parameters and activations name what their dimensions *are* (heads, mlp, batch, ...); only this file knows where
those dimensions live. Code runs under `jax.set_mesh(mesh)`; without a mesh nothing is constrained.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

Axes = tuple[str | None, ...]
"""One logical axis name per dimension of an array; None for a dimension that is never sharded."""

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "pages": ("data", "fsdp"),
    "length": (),
    "slots": (),
    # Between blocks the residual stream is split along the sequence over the tensor axis, so that what remat
    # keeps is not held once per tensor shard (84 -> 64 GiB for 32B at 32k on 8x2).
    "residual_length": ("tensor",),
    # Parameters. The embedding dimension is gathered when used (FSDP); the others are computed where they lie.
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
    # Of the half of an adapter that has no embedding dimension.
    "rank": (),
    "divided_rank": ("fsdp",),
    "groups": (),
}


class MeshError(ValueError):
    """A mesh that does not fit the devices, or an array that does not fit the mesh."""


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as data x fsdp x tensor; at most one size may be -1, "whatever is left".

    Raises MeshError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    shape = "x".join(map(str, sizes.values()))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise MeshError(f"mesh {shape} (data x fsdp x tensor): sizes are positive, at most one is -1")
    if free:
        sizes[free[0]] = len(devices) // int(np.prod([s for s in sizes.values() if s != -1]))
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise MeshError(
            f"mesh {shape} (data x fsdp x tensor) does not match the {len(devices)} devices: "
            "set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to that number"
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=axis_types, devices=devices)
    except NotImplementedError:
        # A TPU slice with no side of such a length (tensor 2 on 8x8): its sides are shared among the axes.
        arranged = mesh_utils.create_device_mesh(tuple(sizes.values()), list(devices), allow_split_physical_axes=True)
        return Mesh(arranged, MESH_AXES, axis_types=axis_types)


def platform() -> str:
    """The platform compiled for: that of the mesh in use, which need not be that of this machine."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None and device.platform else jax.default_backend()


def batch_shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are divided into."""
    return int(np.prod([mesh.shape[axis] for axis in LOGICAL_AXES["batch"]]))


def divisible_rows(rows: int, mesh: Mesh) -> int:
    """So many rows, or a few more that the mesh divides into equal parts."""
    return rows + -rows % batch_shards(mesh)


def process_row_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): of a batch cut into `count` equal parts, this process's devices hold part `index`.

    Raises MeshError if this process's rows are not one such part.
    """
    owners = mesh.devices.reshape(batch_shards(mesh), -1)
    mine = [i for i, row in enumerate(owners) if any(d.process_index == jax.process_index() for d in row)]
    first, size = mine[0], len(mine)
    if mine != list(range(first, first + size)) or first % size or len(owners) % size:
        raise MeshError(f"this process holds the batch shards {mine} of {len(owners)}, which are not one equal part")
    return first // size, len(owners) // size


def partition_spec(axes: Axes, shape: Sequence[int], mesh_shape: dict[str, int]) -> PartitionSpec:
    """Where an array's dimensions lie on a mesh of these sizes.

    Key/value heads fewer than the tensor axis are replicated, never split by head_dim, and a rank that does not divide.

    Raises MeshError if two dimensions want the same mesh axis or a dimension is not divisible by its shards.
    """
    entries: list[tuple[str, ...] | None] = []
    user: dict[str, str] = {}
    for name, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in LOGICAL_AXES[name] if mesh_shape[a] > 1) if name else ()
        shards = int(np.prod([mesh_shape[a] for a in mesh_axes], dtype=int))
        few_heads = name == "kv_heads" and shards % size == 0 and shards > size
        if few_heads or (name == "divided_rank" and size % shards):
            mesh_axes, shards = (), 1
        for axis in mesh_axes:
            if axis in user:
                raise MeshError(f"{axes}: '{user[axis]}' and '{name}' are both on the mesh axis '{axis}'")
            user[axis] = str(name)
        if size % shards:
            raise MeshError(f"'{name}' has size {size}, which {' x '.join(mesh_axes)} = {shards} does not divide")
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def named_sharding(mesh: Mesh | AbstractMesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """`partition_spec` on a mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, dict(mesh.shape)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh in use; dimensions that do not divide (one decoded token) stay whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, x.shape, strict=True):
        mesh_axes = LOGICAL_AXES[name] if name else ()
        shards = int(np.prod([mesh.shape[a] for a in mesh_axes], dtype=int))
        entries.append(mesh_axes if mesh_axes and size % shards == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    sizes = (math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return sum(size * jax.dtypes.itemsize_bits(leaf.dtype) for size, leaf in zip(sizes, leaves, strict=True)) // 8
