"""python decode.py generate CONFIG --plan TARGET: memory and speed of the decode loop, from its compiled program."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from s1jax.config import GenerateConfig
from s1jax.decoding.budget import RowParams, RowState, Tables
from s1jax.decoding.engine import STEPS_PER_CHUNK
from s1jax.decoding.loop import Rows, Shared, decode_chunk
from s1jax.decoding.pages import bucket
from s1jax.decoding.sampling import SamplingParams, draws_of
from s1jax.decoding.setup import rows_of, sampling_of
from s1jax.device_memory import GIB
from s1jax.mesh import batch_shards, device_bytes, make_mesh, named_sharding
from s1jax.model.load import decoding_model
from s1jax.model.paged_attention import CACHE_AXES, PAGE, KVCache, num_pages
from s1jax.model.placement import Machine, decoding_mesh_sizes
from s1jax.model.qwen import Qwen
from s1jax.paths import any_path, write_whole
from s1jax.planning.cli import DOES_NOT_FIT
from s1jax.planning.compiled import compile_for
from s1jax.planning.estimate import Estimate, Memory, estimate, latency, usable_bytes
from s1jax.planning.hardware import PlanError, Target, parse_target
from s1jax.planning.hlo import Collective, Program
from s1jax.planning.traffic import launches, memory_traffic
from s1jax.planning.training import resolve_architecture

_TEXTS, _TEXT_LENGTH, _END_TOKENS = 8, 32, 4
"""Sizes of the tables of delimiters, which are small whatever the profile."""
_DTYPES: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
_ROWS_TRIED = 2
"""Of a mesh, in a search: the rows asked for, and those that there is room for."""


@dataclass(frozen=True)
class GenerationPlan:
    """The decode loop of one batch, with the cache full; bytes and seconds are those of one device."""

    target: str
    mesh: dict[str, int]
    dtype: str
    rows: int
    slots: int
    """Of each row's cache: prompt and output together."""
    pool_tokens: int
    """Of all rows' caches, of one copy of the model: `rows` times `slots`, unless `cache.tokens` is less."""
    memory: Memory
    usable_bytes: int
    rows_that_fit: int
    bytes_per_step: float
    least_bytes_per_step: int
    """Cache and weights, read once, without an embedding of which only the rows' tokens are read."""
    unknown_operations: dict[str, int]
    """Of a chunk of steps, those that move bytes which nobody counted."""
    xla_bytes: float | None
    """What XLA itself counts, where it does: each loop once, memory on the chip included."""
    launches: int
    """Of one step."""
    open_ends: int
    """Of a chunk of steps, loops and branches that a GPU's host waits for to know how they go on."""
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
    plans = _search(config, target) if config.plan.search else [plan_generation(config, target, target.devices())]
    print(_describe(plans[0], target))
    if config.plan.search:
        print("\n" + _ranking(plans))
    if config.plan.output:
        content = [{**asdict(p), "fits": p.fits} for p in plans]
        write_whole(any_path(config.plan.output), json.dumps(content, indent=2) + "\n")
    return 0 if plans[0].fits else DOES_NOT_FIT


def _search(config: GenerateConfig, target: Target) -> list[GenerationPlan]:
    """Plans for tensor axes inside a host, dtypes, and as many rows as are asked for or have room: the fastest first.

    What cannot have room is not compiled, but said.
    """
    plans, devices = [], target.devices()
    tensors = [tensor for tensor in (1, 2, 4, 8) if target.devices_per_host % tensor == 0]
    for tensor, dtype in product(tensors, _DTYPES):
        mesh = replace(config.mesh, data=-1, fsdp=1, tensor=tensor)
        variant = replace(config, mesh=mesh, model=replace(config.model, dtype=dtype))
        tried: set[int] = set()
        rows = rows_of(config.batch_size, make_mesh(1, 1, 1, devices[:1]))
        while rows and rows not in tried:
            tried.add(rows)
            name = f"tensor {tensor}, {dtype}, {rows} rows"
            try:
                plans.append(plan_generation(replace(variant, batch_size=rows), target, devices))
            except ValueError as error:
                print(f"{name}: {error}", flush=True)
                break
            last = plans[-1]
            print(f"{name}: {_tokens_and_memory(last)}", flush=True)
            # Once more with the rows that there is room for, as a power of two.
            rows = 1 << (last.rows_that_fit.bit_length() - 1) if last.rows_that_fit and len(tried) < _ROWS_TRIED else 0
    if not plans:
        raise PlanError(f"{target}: no mesh could be compiled")
    return sorted(plans, key=lambda p: (not p.fits, -p.tokens_per_second * p.copies))


def _ranking(plans: Sequence[GenerationPlan]) -> str:
    lines = ["ranked (those that fit first, by tokens/s):"]
    for p in plans:
        mesh = " x ".join(map(str, p.mesh.values()))
        lines.append(f"  mesh {mesh}, {p.dtype}, {p.rows:>5} rows: {_tokens_and_memory(p)}")
    return "\n".join(lines)


def _tokens_and_memory(plan: GenerationPlan) -> str:
    ratio = plan.bytes_per_step / plan.least_bytes_per_step
    return (
        f"{plan.tokens_per_second:,.0f} tokens/s, {1000 * plan.estimate.total:.2f} ms a step, "
        f"{plan.memory.total / GIB:.1f} GiB ({'fits' if plan.fits else 'does not fit'}), bytes {ratio:.3f}"
    )


def plan_generation(config: GenerateConfig, target: Target, devices: Sequence[jax.Device]) -> GenerationPlan:
    """Compile the decode loop for `batch_size` rows of `max_total_tokens`. Raises MeshError or PlanError."""
    copies = len(devices) // target.devices_per_host if config.mesh.copies else 1
    devices = devices[: len(devices) // copies]
    architecture = resolve_architecture(config.model.path)
    model = decoding_model(config.model, architecture, config.cache.dtype)
    machine = Machine(len(devices), target.devices_per_host, usable_bytes(target.hardware))
    mesh = make_mesh(*decoding_mesh_sizes(config.mesh, model, machine), devices)
    context = architecture.max_position_embeddings
    rows = rows_of(config.batch_size, mesh)
    slots = bucket(min(config.max_total_tokens or context, context), context)
    pages = num_pages(slots)
    params = model.abstract_params(mesh, stacked=False)
    shards = batch_shards(mesh)
    pool = rows // shards * pages
    if config.cache.tokens is not None:
        pool = min(pool, num_pages(-(-config.cache.tokens // shards)))
    cache = _abstract_cache(model, mesh, shards * (1 + pool))
    loop: Any = decode_chunk
    with jax.set_mesh(mesh):
        lowered = loop.lower(
            model,
            draws_of(sampling_of(config.sampling)),
            STEPS_PER_CHUNK,
            config.logprobs,
            params,
            _abstract_shared(architecture.vocab_size),
            cache,
            jax.ShapeDtypeStruct((rows, pages), jnp.int32),
            _abstract_rows(rows),
        )
        compiled = compile_for(target, lowered, f"{rows} rows x {slots}")
    program = Program(compiled.text)
    memory = Memory(device_bytes(params), 0, device_bytes(cache), compiled.temporaries)
    usable = usable_bytes(target.hardware)
    roofline = replace(
        estimate(program, target, efficiency=config.plan.efficiency), latency=latency(program, target)
    ).of_one(STEPS_PER_CHUNK)
    traffic = memory_traffic(program)
    room = usable - memory.parameters - memory.temporaries
    looked_up = 0 if model.head_name == "embedding" else device_bytes(params["embedding"])
    return GenerationPlan(
        target=str(target),
        mesh=dict(mesh.shape),
        dtype=config.model.dtype,
        rows=rows,
        slots=slots,
        pool_tokens=shards * pool * PAGE,
        memory=memory,
        usable_bytes=usable,
        rows_that_fit=max(0, int(room / (memory.batch / (shards * pool)) / pages)),
        bytes_per_step=traffic.num_bytes / STEPS_PER_CHUNK,
        least_bytes_per_step=memory.parameters - looked_up + memory.batch,
        unknown_operations=traffic.unknown,
        xla_bytes=compiled.xla_bytes,
        launches=round(launches(program) / STEPS_PER_CHUNK),
        open_ends=program.open_ends,
        collectives=[
            c._replace(runs=round(c.runs / STEPS_PER_CHUNK), num_bytes=c.num_bytes // STEPS_PER_CHUNK)
            for c in program.collectives
        ],
        estimate=roofline,
        tokens_per_second=rows / roofline.total,
        copies=copies,
    )


def _abstract_cache(model: Qwen, mesh: Mesh, pages: int) -> KVCache:
    def on_mesh(of: Any) -> Any:
        sharding = named_sharding(mesh, CACHE_AXES[: of.ndim], of.shape)
        return jax.ShapeDtypeStruct(of.shape, of.dtype, sharding=sharding)

    layer = jax.tree.map(on_mesh, model.abstract_cache(pages, mesh.shape["tensor"]))
    return (layer,) * model.config.num_hidden_layers


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
    number = array(jnp.float32)
    sampling = SamplingParams(number, array(jnp.int32), number, number)
    return Rows(state, params, array(jnp.int32), sampling, array(np.uint32, 2))


def _describe(plan: GenerationPlan, target: Target) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    memory, seconds = plan.memory, plan.estimate
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    hardware, unknown = target.hardware, plan.unknown_operations.items()
    xla = (
        f"  XLA's own count, of one step and a chunk's start and end, memory on the chip included: "
        f"{(plan.xla_bytes or 0) / GIB:.2f} GiB"
    )
    return "\n".join(
        [
            f"{plan.target}, {mesh}: {plan.rows} rows of {plan.slots} tokens"
            + (f", {plan.pool_tokens:,} in all" if plan.pool_tokens < plan.rows * plan.slots else "")
            + (f", in one of {plan.copies} copies" if plan.copies > 1 else ""),
            f"memory: {memory.total / GIB:.1f} GiB = weights {memory.parameters / GIB:.1f} + cache "
            f"{memory.batch / GIB:.1f} + temporaries {memory.temporaries / GIB:.2f}, of {plan.usable_bytes / GIB:.1f}: "
            f"{verdict}; {plan.rows_that_fit} rows would",
            f"bytes per step: {plan.bytes_per_step / GIB:.2f} GiB, "
            f"{plan.bytes_per_step / plan.least_bytes_per_step:.3f} x (weights + cache)",
            *(f"  NOT COUNTED: {name}, {runs} times in {STEPS_PER_CHUNK} steps" for name, runs in unknown),
            *([] if plan.xla_bytes is None else [xla]),
            *(
                f"  {c.kind:<18} {c.runs:>6} times, {c.num_bytes / 2**20:>8.2f} MiB, among {len(c.group)} devices"
                for c in plan.collectives
            ),
            f"step: {1000 * seconds.total:.2f} ms = the longer of memory {1000 * seconds.memory:.2f} and arithmetic "
            f"{1000 * seconds.compute:.2f}, exchange {1000 * seconds.exposed:.2f}, and latency "
            f"{1000 * seconds.latency:.2f}; "
            f"{plan.tokens_per_second:,.0f} tokens/s",
            f"assumed: full caches; memory at {hardware.memory_bandwidth / 1e12:.2f} TB/s; {plan.launches} "
            f"operations of {1e6 * hardware.launch_latency:g} microseconds at least; collectives of "
            f"{1e6 * hardware.collective_latency:g} and {1e6 * hardware.hop_latency:g} for each hop, "
            "and their bandwidth; nothing between steps: no prefill, no scheduling",
        ]
    )
