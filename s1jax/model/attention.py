"""Causal grouped-query attention: one function, and the implementations it chooses from.

Every implementation honours segment ids; none lets two packed examples see each other.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from s1jax.config import Implementation
from s1jax.mesh import LOGICAL_AXES, platform
from s1jax.model import cpu_kernel
from s1jax.model.accelerator_attention import (
    Heads,
    KeyValueHeads,
    cudnn_attention,
    cudnn_takes_packed_rows,
    splash_attention,
)
from s1jax.model.block_attention import BLOCK, block_attention
from s1jax.model.projection import precision_of

_SCORES_PER_CHUNK = 2**26
"""Attention scores that the chunked implementation holds at once: 256 MiB in float32."""
_SHORT = 1024
"""Up to this many keys a plain softmax is as good as any."""


def attention(
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    segment_lengths: Int[Array, "batch segments"] | None = None,
    implementation: Implementation = "auto",
) -> Heads:
    """Softmax attention of each token over itself and those before it, scaled by 1/sqrt(head_dim); softmax in float32.

    `segment_ids` (0 = padding) confine each query to the keys of its own segment. `segment_lengths` are the tokens of
    the segments of each row, 1, 2, ... in order and zeros after them; only "cudnn" reads them.

    `implementation`: "plain" holds all scores at once; "chunked" a bounded number, on any platform; "blocks" and
    "kernel" (one device; computes in float32) are for CPU, "cudnn" (half precision; packed rows from
    Hopper on) for GPU, "splash" for TPU; "auto" takes the best that applies.
    Raises ValueError where an implementation named outright does not apply.
    """
    key, value = _repeat_for_tensor_axis(key), _repeat_for_tensor_axis(value)
    name = implementation
    if name == "auto":
        lengths_known = segment_ids is None or segment_lengths is not None
        name = choose(query.shape[1], query.dtype, packed=segment_ids is not None, lengths_known=lengths_known)
    if name in KERNELS:
        return _sharded(KERNELS[name], query, key, value, segment_ids, segment_lengths)
    chunk = _chunk_length(query) if name == "chunked" else query.shape[1]
    return _in_chunks(query, key, value, segment_ids, chunk)


def choose(length: int, dtype: DTypeLike, *, packed: bool, lengths_known: bool) -> Implementation:
    """What "auto" takes for rows of this many tokens, packed or not, on the platform compiled for."""
    if cpu_kernel.available(jnp.float32):
        return "kernel"
    if length > BLOCK and platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1:
        return "blocks"
    # The accelerators' kernels multiply float32 in less than float32.
    if length % 128 == 0 and dtype != jnp.float32:
        on = platform()
        if on == "tpu":
            return "splash"
        if on in ("gpu", "cuda") and lengths_known and (not packed or cudnn_takes_packed_rows()):
            return "cudnn"
    return "plain" if length <= _SHORT else "chunked"


def _repeat_for_tensor_axis(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Repeat key/value heads until each tensor shard has one, where there are fewer of them than shards."""
    shards = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return jnp.repeat(x, shards // x.shape[2], axis=2) if shards > x.shape[2] else x


def _chunk_length(query: Heads) -> int:
    batch, length, heads, _ = query.shape
    chunk = max(16, _SCORES_PER_CHUNK // (batch * heads * length))
    return min(length, 1 << (chunk.bit_length() - 1))


def _in_chunks(
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
    segment_ids: Int[Array, "batch length"] | None,
    chunk: int,
) -> Heads:
    """Attend `chunk` queries at a time; the backward pass computes each chunk's scores again."""
    index = jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])

    def attend(chunk_of: tuple[Array, Array, Array | None]) -> Array:
        chunk_query, chunk_index, chunk_segments = chunk_of
        mask = index[:, None] <= chunk_index[..., None]
        if chunk_segments is not None:
            mask &= chunk_segments[..., None] == segment_ids[:, None, :]  # type: ignore[index]
        return _softmax_attention(chunk_query, key, value, mask)

    batch, length = query.shape[:2]
    if chunk >= length:
        return attend((query, index, segment_ids))
    padding = -length % chunk

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    chunks = (split(query), split(index), None if segment_ids is None else split(segment_ids))
    out = jax.lax.map(jax.checkpoint(attend), chunks)
    return jnp.moveaxis(out, 0, 1).reshape(batch, length + padding, *query.shape[2:])[:, :length]


def _softmax_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: KeyValueHeads,
    value: KeyValueHeads,
    mask: Bool[Array, "batch queries length"],
) -> Float[Array, "batch queries heads head_dim"]:
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # One matrix for each row and key/value head, the queries of its group one below the other: a CPU's library takes
    # products of that form only, and is twice as fast as XLA's own.
    grouped = (query * head_dim**-0.5).reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    stacked = grouped.reshape(batch, kv_heads, -1, head_dim)
    product = partial(jnp.einsum, precision=precision_of(query), preferred_element_type=jnp.float32)
    scores = product("bkqd,bkds->bkqs", stacked, key.transpose(0, 2, 3, 1))
    scores = scores.reshape(*grouped.shape[:4], -1)
    # A finite mask value, so that a row with no key to see (chunk padding) is not a NaN in the backward pass.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    weights = weights.astype(value.dtype).reshape(*stacked.shape[:3], -1)
    total = jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)
    context = product("bkqs,bksd->bkqd", weights, value.swapaxes(1, 2))
    context = (context / total).astype(query.dtype).reshape(grouped.shape)
    return context.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _sharded(
    kernel: Callable[..., Heads],
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
    segment_ids: Int[Array, "batch length"] | None,
    segment_lengths: Int[Array, "batch segments"] | None,
) -> Heads:
    """Run a kernel that the partitioner cannot see into on each shard's own rows and heads."""
    operands = (query, key, value, segment_ids, segment_lengths)
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*operands)
    batch, heads = LOGICAL_AXES["batch"], LOGICAL_AXES["heads"]
    qkv, rows = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
    return jax.shard_map(kernel, in_specs=(qkv, qkv, qkv, rows, rows), out_specs=qkv, check_vma=False)(*operands)


def _blocks(query: Heads, key: KeyValueHeads, value: KeyValueHeads, segment_ids: Array | None, _: Any) -> Heads:
    return block_attention(query, key, value, segment_ids)


def _kernel(query: Heads, key: KeyValueHeads, value: KeyValueHeads, segment_ids: Array | None, _: Any) -> Heads:
    if not cpu_kernel.available(jnp.float32):
        raise ValueError("attention: kernel runs on one CPU device, for which a C++ compiler makes it")
    if segment_ids is None:
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    return cpu_kernel.packed_attention(*wide, segment_ids).astype(query.dtype)


KERNELS: dict[str, Callable[..., Heads]] = {
    "blocks": _blocks,
    "kernel": _kernel,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
