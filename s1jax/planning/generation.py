"""python decode.py generate CONFIG --plan TARGET: memory and speed of the decode loop, from its compiled program."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s1jax.config import GenerateConfig
from s1jax.decoding.budget import RowParams, RowState, Tables
from s1jax.decoding.generate import STEPS_PER_CHUNK, bucket
from s1jax.decoding.loop import Rows, Shared, decode_chunk
from s1jax.decoding.setup import sampling_of
from s1jax.mesh import batch_shards, make_mesh, named_sharding
from s1jax.model.load import build_model
from s1jax.model.qwen import CACHE_AXES, KVCache, LayerCache, Qwen
from s1jax.paths import any_path, write_whole
from s1jax.planning.cli import DOES_NOT_FIT
from s1jax.planning.estimate import Estimate, Memory, estimate, temporaries, usable_bytes
from s1jax.planning.hardware import GIB, Target, parse_target
from s1jax.planning.hlo import Collective, Program
from s1jax.planning.traffic import memory_traffic
from s1jax.planning.training import device_bytes, resolve_architecture

_TEXTS, _TEXT_LENGTH, _END_TOKENS = 8, 32, 4
"""Sizes of the tables of delimiters, which are small whatever the profile."""


@dataclass(frozen=True)
class GenerationPlan:
    """The decode loop of one batch, with every row's cache full; bytes and seconds are those of one device."""

    target: str
    mesh: dict[str, int]
    rows: int
    slots: int
    """Of each row's cache: prompt and output together."""
    memory: Memory
    usable_bytes: int
    rows_that_fit: int
    bytes_per_step: float
    least_bytes_per_step: int
    """Weights and cache, read once."""
    collectives: list[Collective]
    estimate: Estimate
    """Of one step."""
    tokens_per_second: float
    """Of all rows together."""
    copies: int
    """Of the model, each on a host of its own with as many rows."""

    @property
    def fits(self) -> bool:
        """Whether the batch has room."""
        return self.memory.total <= self.usable_bytes


def plan(config: GenerateConfig) -> int:
    """Print the plan that the configuration asks for and write `plan.output`; returns the exit status.

    The status is 0 if the batch fits, 3 if it does not. Raises ValueError or a subclass with what to change.
    """
    assert config.plan.target is not None
    target = parse_target(config.plan.target)
    result = plan_generation(config, target, target.devices())
    print(_describe(result, target))
    if config.plan.output:
        content = {**asdict(result), "fits": result.fits}
        write_whole(any_path(config.plan.output), json.dumps(content, indent=2) + "\n")
    return 0 if result.fits else DOES_NOT_FIT


def plan_generation(config: GenerateConfig, target: Target, devices: Sequence[jax.Device]) -> GenerationPlan:
    """Compile the decode loop for `batch_size` rows of `max_total_tokens`. Raises MeshError or PlanError."""
    copies = len(devices) // target.devices_per_host if config.mesh.copies else 1
    devices = devices[: len(devices) // copies]
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    architecture = resolve_architecture(config.model.path)
    model = build_model(config.model, architecture, param_dtype=config.model.dtype)
    context = architecture.max_position_embeddings
    rows = config.batch_size + -config.batch_size % batch_shards(mesh)
    slots = bucket(min(config.max_total_tokens or context, context), context)
    params, cache = model.abstract_params(mesh, stacked=False), _abstract_cache(model, mesh, rows, slots)
    loop: Any = decode_chunk
    with jax.set_mesh(mesh):
        lowered = loop.lower(
            model,
            sampling_of(config.sampling),
            STEPS_PER_CHUNK,
            config.logprobs,
            params,
            _abstract_shared(architecture.vocab_size),
            cache,
            _abstract_rows(rows),
        )
        compiled = lowered.compile()
    program = Program(compiled.as_text())
    memory = Memory(device_bytes(params), 0, device_bytes(cache), temporaries(compiled, target.hardware.platform))
    usable = usable_bytes(target.hardware)
    roofline = estimate(program, target, mesh, efficiency=config.plan.efficiency)
    room = usable - memory.parameters - memory.temporaries
    return GenerationPlan(
        target=str(target),
        mesh=dict(mesh.shape),
        rows=rows,
        slots=slots,
        memory=memory,
        usable_bytes=usable,
        rows_that_fit=max(0, int(room / (memory.batch / rows))),
        bytes_per_step=memory_traffic(program),
        least_bytes_per_step=memory.parameters + memory.batch,
        collectives=program.collectives,
        estimate=roofline,
        tokens_per_second=rows / roofline.total,
        copies=copies,
    )


def _abstract_cache(model: Qwen, mesh: Mesh, rows: int, slots: int) -> KVCache:
    config = model.config
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)
    leaf: Any = jax.ShapeDtypeStruct(shape, model.dtype, sharding=named_sharding(mesh, CACHE_AXES, shape))
    return (LayerCache(leaf, leaf),) * config.num_hidden_layers


def _abstract_shared(vocab_size: int) -> Shared:
    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    flags = array(jnp.bool_, vocab_size)
    tables = Tables(
        text_ids=array(jnp.int32, _TEXTS, _TEXT_LENGTH),
        text_lengths=array(jnp.int32, _TEXTS),
        is_end=flags,
        is_eos=flags,
        ends_in_newline=flags,
    )
    return Shared(tables, flags, array(jnp.int32, _END_TOKENS))


def _abstract_rows(rows: int) -> Rows:
    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    flags = {"mask_end", "ends_in_newline"}
    state = RowState(**{name: array(jnp.bool_ if name in flags else jnp.int32) for name in RowState._fields})
    params = RowParams(**{name: array(jnp.int32) for name in RowParams._fields})
    return Rows(state, params, array(jnp.int32), array(np.uint32, 2))


def _describe(plan: GenerationPlan, target: Target) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    memory, seconds = plan.memory, plan.estimate
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return "\n".join(
        [
            f"{plan.target}, {mesh}: {plan.rows} rows of {plan.slots} tokens"
            + (f", in one of {plan.copies} copies" if plan.copies > 1 else ""),
            f"memory: {memory.total / GIB:.1f} GiB = weights {memory.parameters / GIB:.1f} + cache "
            f"{memory.batch / GIB:.1f} + temporaries {memory.temporaries / GIB:.2f}, of {plan.usable_bytes / GIB:.1f}: "
            f"{verdict}; {plan.rows_that_fit} rows would",
            f"bytes per step: {plan.bytes_per_step / GIB:.2f} GiB, "
            f"{plan.bytes_per_step / plan.least_bytes_per_step:.3f} x (weights + cache)",
            *(
                f"  {c.kind:<18} {c.runs:>6} times, {c.num_bytes / 2**20:>8.2f} MiB, among {len(c.group)} devices"
                for c in plan.collectives
            ),
            f"step: {1000 * seconds.total:.2f} ms = the longer of memory {1000 * seconds.memory:.2f} and arithmetic "
            f"{1000 * seconds.compute:.2f}, and exchange {1000 * seconds.exposed:.2f}; "
            f"{plan.tokens_per_second:,.0f} tokens/s",
            f"assumed: full caches; memory at {target.hardware.memory_bandwidth / 1e12:.2f} TB/s; collectives by "
            "bandwidth alone (their latency, some microseconds each, is not counted)",
        ]
    )
