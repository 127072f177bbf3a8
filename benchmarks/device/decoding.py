"""Decode steps at many sizes of batch and context, beside the least that the device could need and a plan."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.report import Report, Row
from benchmarks.device.sizes import Sizes
from benchmarks.device.timing import seconds_of, shares_of_time
from s1jax.decoding.benchmark import unending_rows
from s1jax.decoding.engine import STEPS_PER_CHUNK
from s1jax.decoding.loop import decode_chunk, empty_cache
from s1jax.decoding.pages import full_table
from s1jax.decoding.sampling import Draws
from s1jax.device_memory import limit_bytes
from s1jax.mesh import make_mesh
from s1jax.model.paged_attention import PAGE, num_pages
from s1jax.model.qwen import Params, Qwen
from s1jax.planning.estimate import estimate, latency
from s1jax.planning.hardware import HARDWARE, Target
from s1jax.planning.hlo import Program

_MOST_OF_MEMORY = 0.9
"""Of what jax may take; the rest is for what a step computes."""
_UNDIVIDED = {"xla_gpu_experimental_force_split_k": "1"}
"""Keeps XLA for GPUs from dividing a product's sums among blocks that each write a part of the result."""


def run(report: Report, sizes: Sizes) -> None:
    """All cases of one model after another, so that its weights are made once."""
    loaded: dict[str, tuple[Qwen, Params]] = {}
    device = jax.local_devices()[0]
    for name, length, rows in sizes.decoding:
        config = sizes.models[name]
        config = replace(config, num_hidden_layers=sizes.layers.get(name, config.num_hidden_layers))
        model = Qwen(config, param_dtype=jnp.bfloat16)
        with jax.set_mesh(make_mesh(1, 1, 1, [device])):
            case = f"{name}, {length:,} tokens, {rows} rows"
            memory = limit_bytes(device)
            needed = _bytes(model.abstract_params(stacked=False)) + _bytes(_abstract_cache(model, rows, length))
            if memory and needed > _MOST_OF_MEMORY * memory:
                report.leave_out("Decoding", case, f"{needed / 2**30:.0f} GiB of weights and cache")
                continue
            if name not in loaded:
                loaded.clear()
                loaded[name] = (model, _weights(model))
            report.case("Decoding", case, partial(_decode, report, case, *loaded[name], length, rows))


def _abstract_cache(model: Qwen, rows: int, length: int) -> Any:
    return jax.eval_shape(lambda: empty_cache(model, 1 + rows * num_pages(length)))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _weights(model: Qwen) -> Params:
    """Random parameters of bfloat16, made where they are used."""
    shapes = model.abstract_params(stacked=False)
    leaves, tree = jax.tree.flatten(shapes)
    make = jax.jit(lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [make(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)])


def _decode(report: Report, case: str, model: Qwen, params: Params, length: int, rows: int) -> Row:
    device = jax.local_devices()[0]
    # The last chunk that ends at this length: then the filled part of the cache is all of it.
    table = full_table(1, rows, num_pages(length))
    shared, state = unending_rows(model.config.vocab_size, rows, length - STEPS_PER_CHUNK)
    cache = [empty_cache(model, 1 + table.size)]
    started = time.perf_counter()
    loop: Any = decode_chunk
    lowered = loop.lower(model, Draws(greedy=True), STEPS_PER_CHUNK, False, params, shared, cache[0], table, state)
    chunk = lowered.compile()
    compiled_in = time.perf_counter() - started
    text = chunk.as_text()

    def take(chunk: Any = chunk) -> Any:
        cache[0], *others = chunk(params, shared, cache[0], table, state)
        return others

    seconds = seconds_of(take, repeats=3) / STEPS_PER_CHUNK
    parts = shares_of_time(take)
    undivided = None
    if device.platform == "gpu":
        undivided = seconds_of(partial(take, lowered.compile(_UNDIVIDED)), repeats=3) / STEPS_PER_CHUNK
    weights = _bytes(params)
    if not model.config.tie_word_embeddings:
        weights -= _bytes(params["embedding"])
    filled = _bytes(cache[0]) * rows * length / (PAGE * (1 + table.size))
    if device.platform == "gpu":
        known = "known_trip_count" in text
        found = "the loop's length is known" if known else "it is not"
        report.verdict(f"the host waits for no step ({case})", passed=known, found=found)
    hardware = next((h for h in HARDWARE.values() if device.device_kind.startswith(h.kind)), None)
    row: Row = {
        "ms a step": 1e3 * seconds,
        "tokens/s": rows / seconds,
        "GB a step": (weights + filled) / 1e9,
        "GB/s": (weights + filled) / seconds / 1e9,
    }
    if undivided is not None:
        row["ms with undivided sums"] = 1e3 * undivided
    if hardware is not None:
        target = Target(hardware, (1, 1))
        program = Program(text)
        planned = estimate(program, target, efficiency=1.0).total + latency(program, target)
        row["share of bandwidth"] = (weights + filled) / seconds / hardware.memory_bandwidth
        row["planned ms"] = 1e3 * planned / STEPS_PER_CHUNK
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        **row,
        **{f"time in {part}": share for part, share in parts.items()},
        "compile s": compiled_in,
        "peak GiB": peak / 2**30 if peak else None,
    }
