"""Causal attention for a CPU: blocks of queries by blocks of keys, and no block whose scores are all masked.

What it costs follows the lengths of the examples in a row, not the length of the row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from s1jax.model.projection import precision_of

BLOCK = 128
"""Tokens of a block: scores of one pair of blocks stay in a core's cache."""
MASKED = float(jnp.finfo(jnp.float32).min)
"""The score of a key that is not seen: finite, so that a query that has seen no key yet is no NaN."""

Queries = Float[Array, "blocks batch kv_heads rows head_dim"]
"""Scaled queries; the rows of a block are its tokens, for one head of the key/value head's group after the other."""
Keys = Float[Array, "blocks batch kv_heads block head_dim"]
PerQuery = Float[Array, "blocks batch kv_heads rows"]
Segments = Int[Array, "blocks batch block"]


def block_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"] | None,
) -> Float[Array, "batch length heads head_dim"]:
    """Causal softmax attention within segments, scaled by 1/sqrt(head_dim); softmax in float32."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    # Padding is last in a row: as the largest number it leaves the segments of neighbouring blocks apart.
    segments = _split(segment_ids)
    segments = jnp.where(segments == 0, jnp.iinfo(jnp.int32).max, segments)
    queries = _split(query * head_dim**-0.5).reshape(-1, batch, BLOCK, kv_heads, heads // kv_heads, head_dim)
    queries = queries.transpose(0, 1, 3, 4, 2, 5).reshape(-1, batch, kv_heads, heads // kv_heads * BLOCK, head_dim)
    out = _attend(queries, _split(key).swapaxes(2, 3), _split(value).swapaxes(2, 3), segments)
    out = out.reshape(-1, batch, kv_heads, heads // kv_heads, BLOCK, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, -1, heads, head_dim)[:, :length]


def _split(x: Array) -> Array:
    """Blocks of the length, on a first axis."""
    batch, length = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -length % BLOCK)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, -1, BLOCK, *x.shape[2:]), 1, 0)


def _first_blocks(segments: Segments) -> Int[Array, " blocks"]:
    """Of each block of queries, the first block with a key of the same segment, as far as their ranges tell."""
    low, high = jnp.min(segments, axis=2), jnp.max(segments, axis=2)
    shared = jnp.any((low[:, None] <= high[None]) & (low[None] <= high[:, None]), axis=2)
    return jnp.argmax(shared, axis=1)


def _seen(segments: Segments, i: Int[Array, ""], j: Int[Array, ""]) -> Bool[Array, "batch queries keys"]:
    """Whether each query of block i sees each key of block j."""
    index = jnp.arange(BLOCK)
    causal = j * BLOCK + index <= i * BLOCK + index[:, None]
    return causal & (segments[i][:, :, None] == segments[j][:, None, :])


Sums = tuple[Float[Array, "*queries"], Float[Array, "*queries"], Float[Array, "*queries head_dim"]]
"""Of some queries over a part of their keys: the largest score, and relative to it the sums of weights and values."""


def no_blocks(shape: tuple[int, ...]) -> Sums:
    """The sums of queries of this shape, heads' size last, that have seen no key."""
    return jnp.full(shape[:-1], MASKED), jnp.zeros(shape[:-1]), jnp.zeros(shape)


def add_block(sums: Sums, scores: Float[Array, "*queries keys"], value: Float[Array, "*rows keys head_dim"]) -> Sums:
    """The sums with these keys as well."""
    largest, total, context = sums
    larger = jnp.maximum(largest, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - larger[..., None])
    shrink = jnp.exp(largest - larger)
    total = total * shrink + jnp.sum(weights, axis=-1)
    context = context * shrink[..., None] + product(weights.astype(value.dtype), value)
    return larger, total, context


@jax.custom_vjp
def _attend(query: Queries, key: Keys, value: Keys, segments: Segments) -> Queries:
    return _forward(query, key, value, segments)[0]


def _forward(
    query: Queries, key: Keys, value: Keys, segments: Segments
) -> tuple[Queries, tuple[Queries, Keys, Keys, Segments, Queries, PerQuery]]:
    first = _first_blocks(segments)
    # A CPU's library takes products of this form as they are; of others XLA writes a transposed copy, slowly.
    key_columns = key.swapaxes(3, 4)

    def attend(i: Array) -> tuple[Array, Array]:
        def add(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            scores = product(query[i], key_columns[j])
            by_head = scores.reshape(*scores.shape[:2], -1, BLOCK, BLOCK)
            scores = jnp.where(_seen(segments, i, j)[:, None, None], by_head, MASKED).reshape(scores.shape)
            return add_block(carry, scores, value[j])

        largest, total, context = jax.lax.fori_loop(first[i], i + 1, add, no_blocks(query.shape[1:]))
        return (context / total[..., None]).astype(query.dtype), largest + jnp.log(total)

    out, normaliser = jax.lax.map(attend, jnp.arange(query.shape[0]))
    return out, (query, key, value, segments, out, normaliser)


def _backward(
    kept: tuple[Queries, Keys, Keys, Segments, Queries, PerQuery], gradient: Queries
) -> tuple[Queries, Keys, Keys, None]:
    """Scores once more, with keys as rows and queries as columns, in which form no product needs a transposed copy."""
    query, key, value, segments, out, normaliser = kept
    first = _first_blocks(segments)
    query_columns, key_columns, gradient_columns = (x.swapaxes(3, 4) for x in (query, key, gradient))
    shared = jnp.sum(gradient.astype(jnp.float32) * out, axis=-1)

    def attend(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        def add(j: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            of_query, of_key, of_value = sums
            scores = product(key[j], query_columns[i])
            weights = jnp.exp(scores - normaliser[i][:, :, None])
            by_head = weights.reshape(*weights.shape[:3], -1, BLOCK)
            seen = _seen(segments, i, j).swapaxes(1, 2)[:, None, :, None]
            weights = jnp.where(seen, by_head, 0.0).reshape(weights.shape)
            of_scores = weights * (product(value[j], gradient_columns[i]) - shared[i][:, :, None])
            of_scores = of_scores.astype(query.dtype)
            return (
                of_query.at[i].add(product(key_columns[j], of_scores)),
                of_key.at[j].add(product(of_scores, query[i])),
                of_value.at[j].add(product(weights.astype(value.dtype), gradient[i])),
            )

        return jax.lax.fori_loop(first[i], i + 1, add, sums)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query_columns, key, value))
    of_query, of_key, of_value = jax.lax.fori_loop(0, query.shape[0], attend, zeros)
    return of_query.swapaxes(3, 4).astype(query.dtype), of_key.astype(key.dtype), of_value.astype(value.dtype), None


def product(left: Array, right: Array) -> Array:
    """The matrix product, in float32 whatever the operands are."""
    return jnp.matmul(left, right, precision=precision_of(left), preferred_element_type=jnp.float32)


_attend.defvjp(_forward, _backward)
