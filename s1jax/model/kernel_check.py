"""Attention kernels are held against plain attention on the device itself before a run believes them."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.typing import DTypeLike

from s1jax.compilation_cache import user_cache
from s1jax.config import CacheDtype, Implementation
from s1jax.model.attention import KERNELS, attention, choose
from s1jax.model.paged_attention import KERNELS as PAGED_KERNELS
from s1jax.model.paged_attention import (
    PAGE,
    QUANTISED_KERNELS,
    LayerCache,
    choose_paged,
    num_pages,
    paged_attention,
)
from s1jax.model.quantised_heads import quantised
from s1jax.model.qwen import Qwen
from s1jax.paths import write_whole
from s1jax.strict_json import parse_json

TOLERANCES = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-4}
"""How far a kernel may be from plain attention in float32, by the dtype that it is given; about five times what
rounding alone makes of it. A score too many or too few makes ten times more."""
_LENGTHS = ((300, 1, 83), (512,), (), (2, 3, 5, 7, 128))
"""Examples of the rows that are tried: with padding, full, empty, short."""
_ROW_LENGTH = 512
_PAGED_LENGTHS = (1, 63, 64, 65, 300, 1000, 129, 640)
"""Tokens of the rows that are tried."""


class HeadSizes(NamedTuple):
    """What a kernel is compiled for, beside the length of rows."""

    heads: int
    kv_heads: int
    head_dim: int


def attention_errors(
    implementation: Implementation,
    sizes: HeadSizes,
    dtype: DTypeLike,
    lengths: Sequence[Sequence[int]] = _LENGTHS,
    row_length: int = _ROW_LENGTH,
    *,
    packed: bool,
    gradients: bool,
) -> dict[str, float]:
    """How far an implementation is from plain attention in float32 on random rows of examples of these lengths.

    Norm of the difference over the norm of what is right, over all tokens of examples: of the "output", and with
    `gradients` of those of "query", "key" and "value". Not `packed`, all rows are full. Infinite where not finite.
    """
    ids = np.zeros((len(lengths), row_length), np.int32)
    table = np.zeros((len(lengths), max(map(len, lengths))), np.int32)
    for row, examples in enumerate(lengths):
        table[row, : len(examples)] = examples
        ids[row, : sum(examples)] = np.repeat(np.arange(1, len(examples) + 1), examples)
    segments = (jnp.asarray(ids), jnp.asarray(table)) if packed else (None, None)
    real = jnp.asarray(ids > 0)[..., None, None] if packed else jnp.ones((), bool)
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
    keys = jax.random.split(jax.random.key(0), 4)
    *qkv, weights = (
        jax.random.normal(key, (*ids.shape, count, sizes.head_dim), dtype)
        for key, count in zip(keys, heads, strict=True)
    )

    def loss(qkv: tuple[jax.Array, ...], name: Implementation) -> tuple[jax.Array, jax.Array]:
        out = attention(*qkv, segment_ids=segments[0], segment_lengths=segments[1], implementation=name)
        out = jnp.where(real, out, 0).astype(jnp.float32)
        return jnp.sum(out * weights.astype(jnp.float32)), out

    def run(qkv: tuple[jax.Array, ...], name: Implementation) -> dict[str, jax.Array]:
        if not gradients:
            return {"output": jax.jit(partial(loss, name=name))(qkv)[1]}
        of_qkv, out = jax.jit(jax.grad(partial(loss, name=name), has_aux=True))(qkv)
        return {"output": out, **dict(zip(("query", "key", "value"), of_qkv, strict=True))}

    ours = run(tuple(qkv), implementation)
    right = run(tuple(x.astype(jnp.float32) for x in qkv), "chunked")
    return {name: _distance(jnp.where(real, ours[name], 0), jnp.where(real, right[name], 0)) for name in ours}


def paged_error(
    implementation: Implementation,
    sizes: HeadSizes,
    dtype: DTypeLike,
    lengths: Sequence[int] = _PAGED_LENGTHS,
    *,
    cache_dtype: CacheDtype | None = None,
) -> float:
    """How far an implementation is from gathering the pages, in float32, with rows that hold so many tokens.

    As `attention_errors` of the output; also infinite if the device refuses to run it.
    """
    rng = np.random.default_rng(0)
    pages = sum(map(num_pages, lengths))
    # Fewer pages than the table has entries, in no order, as rows of an engine have them.
    free = iter(rng.permutation(np.arange(1, pages + 1)))
    table = np.zeros((len(lengths), 2 * num_pages(max(lengths))), np.int32)
    for row, length in zip(table, lengths, strict=True):
        row[: num_pages(length)] = [next(free) for _ in range(num_pages(length))]
    shape = (sizes.kv_heads, pages + 1, PAGE, sizes.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (len(lengths), 1, sizes.heads, sizes.head_dim), dtype)
    pages_of = [jax.random.normal(key, shape, dtype) for key in keys[1:]]
    cache = LayerCache(*(map(quantised, pages_of) if cache_dtype else pages_of))
    last = jnp.asarray(lengths, jnp.int32) - 1

    def run(query: jax.Array, cache: LayerCache, name: Implementation) -> jax.Array:
        return jax.jit(partial(paged_attention, implementation=name))(query, cache, jnp.asarray(table), last[:, None])

    wide = cache if cache_dtype else jax.tree.map(lambda x: x.astype(jnp.float32), cache)
    right = run(query.astype(jnp.float32), wide, "plain")
    try:
        return _distance(run(query, cache, implementation), right)
    except (RuntimeError, NotImplementedError) as error:
        print(f"attention over pages: {implementation}: {str(error).splitlines()[0]}", file=sys.stderr)
        return math.inf


def _distance(ours: jax.Array, right: jax.Array) -> float:
    distance = float(jnp.linalg.norm(ours.astype(jnp.float32) - right) / jnp.linalg.norm(right))
    return distance if math.isfinite(distance) else math.inf


def checked(model: Qwen, *, gradients: bool) -> Qwen:
    """The model, without the attention kernel that it would use here if that does not compute what it should.

    What was found is kept for this user, by kernel, device and versions. Processes do not wait for one another here.
    """
    name = model.attention
    if name == "auto":
        name = choose(_ROW_LENGTH, model.dtype, packed=gradients, lengths_known=True)
    is_quantised = model.cache_dtype is not None
    paged = name if model.attention != "auto" else choose_paged(model.dtype, model.config.head_dim, is_quantised)
    of_pages = (QUANTISED_KERNELS if is_quantised else PAGED_KERNELS).get(paged)
    kernels = (KERNELS.get(name), None if gradients else of_pages)
    worst = _error(model, name, gradients, kernels) if any(kernels) else 0.0
    tolerance = TOLERANCES[jnp.dtype(model.dtype).name]
    if worst <= tolerance:
        return model
    print(
        f"attention: {name} is not used: on {jax.local_devices()[0].device_kind} it is {worst:.2g} away from plain "
        f"attention, where {tolerance:.2g} is expected at most; chunked attention is used instead",
        file=sys.stderr,
    )
    return replace(model, attention="chunked")


def _error(model: Qwen, name: Implementation, gradients: bool, kernels: tuple[Callable[..., Any] | None, ...]) -> float:
    """The largest of the errors of what this name has for packed rows and for pages, looked up or found out."""
    sizes = HeadSizes(model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim)
    dtype = jnp.dtype(model.dtype).name
    device = jax.local_devices()[0]
    versions = (jax.__version__, jaxlib.__version__, device.client.platform_version)
    functions = [kernel and kernel.__qualname__ for kernel in kernels]
    key = repr((name, tuple(sizes), dtype, model.cache_dtype, gradients, functions, device.device_kind, *versions))
    path = user_cache().parent / "kernels.json"
    try:
        known = dict(parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        known = {}
    if not isinstance(known.get(key), float):
        # One key/value head with its queries: kernels treat all of them alike.
        one = HeadSizes(sizes.heads // sizes.kv_heads * 2, 2, sizes.head_dim)
        of_rows, of_pages = kernels
        errors = attention_errors(name, one, dtype, packed=gradients, gradients=gradients) if of_rows else {}
        if of_pages:
            errors["pages"] = paged_error(name, one, dtype, cache_dtype=model.cache_dtype)
        error = max(errors.values())
        known[key] = error
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(known, indent=2) + "\n")
        except OSError:
            pass  # Nothing is lost but seconds of the next start.
    return float(known[key])
