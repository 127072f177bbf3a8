"""Causal attention by the kernels of GPUs and TPUs: over packed rows whose examples do not see each other, and of one
token over the pages of a cache.

They take what one device has: `attention` calls them on each shard's own rows and heads.
"""

import inspect
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from s1jax.model.quantised_heads import Quantised

Heads = Float[Array, "batch length heads head_dim"]
KeyValueHeads = Float[Array, "batch length kv_heads head_dim"]

CachedHeads = Float[Array, "kv_heads pages slots head_dim"]

_TPU_BLOCK = 1024
"""Most tokens of a block of TPU's kernel. As v5p's compiler schedules it, one of 256 takes 2.9 times as long for each
score, one of 512 1.3 times, one of 1,280 the same."""
_PAGES_PER_BLOCK = 8
"""Of TPU's kernel for pages: so many are computed together."""
_SPLITS = 8
"""Of Triton's kernel for pages: so many parts of a row are computed side by side, so that few rows fill a GPU."""
_PAGES_AT_ONCE = 2
"""Of Triton's kernel: more have no room beside a processor in float32, to which it widens values."""


def cudnn_takes_packed_rows() -> bool:
    """Whether cuDNN keeps the examples of a row apart on the GPU compiled for: from Hopper on."""
    from jax._src.cudnn.fused_attention_stablehlo import check_compute_capability

    return check_compute_capability("9.0")


def lengths_and_offsets(
    segment_lengths: Int[Array, "batch segments"],
) -> tuple[Int[Array, "batch segments"], Int[Array, "batch segments_and_one"]]:
    """The tokens of each row's examples and where they begin, as cuDNN wants them: -1 where there is none."""
    there = segment_lengths > 0
    starts = jnp.cumsum(segment_lengths, axis=1, dtype=jnp.int32) - segment_lengths
    offsets = jnp.pad(jnp.where(there, starts, -1), ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(there, segment_lengths, -1), offsets


def cudnn_attention(
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
    segment_ids: Int[Array, "batch length"] | None,
    segment_lengths: Int[Array, "batch segments"] | None,
) -> Heads:
    """cuDNN's flash attention, in half precision. What it does follows the lengths of the examples, not of the rows.

    At padding the result is zero, and so are the gradients. Raises ValueError for packed rows without
    `segment_lengths`: cuDNN wants to be told where each example begins and how long it is.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    scale = query.shape[-1] ** -0.5
    if segment_ids is None:
        return dot_product_attention(query, key, value, scale=scale, mask_type=MaskType.CAUSAL)
    if segment_lengths is None:
        raise ValueError("attention: cudnn needs the lengths of the examples in packed rows")
    if segment_lengths.shape[1] == 1:
        lengths, starts = segment_lengths[:, 0], None
    else:
        lengths, starts = lengths_and_offsets(segment_lengths)
        if jax.__version_info__ < (0, 11, 1):
            # It multiplied the keys' offsets by the number of the queries' heads.
            groups = query.shape[2] // key.shape[2]
            key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    # cuDNN leaves whatever was in memory at padding, in results and in gradients: a `where` on both sides of it keeps
    # that from everything else, as a product with zero would not.
    real = (segment_ids > 0)[:, :, None, None]
    out = dot_product_attention(
        jnp.where(real, query, 0),
        jnp.where(real, key, 0),
        jnp.where(real, value, 0),
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=scale,
        mask_type=MaskType.PADDING_CAUSAL,
    )
    return jnp.where(real, out, 0)


def splash_attention(
    query: Heads,
    key: KeyValueHeads,
    value: KeyValueHeads,
    segment_ids: Int[Array, "batch length"] | None,
    segment_lengths: Int[Array, "batch segments"] | None,
) -> Heads:
    """TPU's flash attention. Blocks above the diagonal are skipped; those of other examples are computed and masked.

    A row is computed in blocks of one size, which may hold a little more than it has; no token sees those after it.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, head_dim = query.shape[1:]
    blocks = -(-length // _TPU_BLOCK)
    block = 128 * -(-length // (128 * blocks))
    whole = blocks * block
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((whole, whole))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
    )

    def row(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        ids = None if segments is None else splash.SegmentIds(segments, segments)
        return kernel(q, k, v, segment_ids=ids)

    filled = [(0, 0), (0, whole - length), (0, 0), (0, 0)]
    q, k, v = (jnp.swapaxes(jnp.pad(x, filled), 1, 2) for x in (query * head_dim**-0.5, key, value))
    ids = None if segment_ids is None else jnp.pad(segment_ids, filled[:2])
    out = jax.vmap(row, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids)
    return jnp.swapaxes(out[:, :, :length], 1, 2)


def cudnn_paged_attention(
    query: Float[Array, "batch kv_heads queries head_dim"],
    keys: CachedHeads,
    values: CachedHeads,
    table: Int[Array, "batch row_pages"],
    last: Int[Array, " batch"],
) -> Float[Array, "batch kv_heads queries head_dim"]:
    """cuDNN's attention of one token in each row over its tokens 0..last, in half precision."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    batch, heads, queries, head_dim = query.shape
    pages = keys.shape[1]
    # Each key/value head is a row of its own, with its own part of all heads' pages: a copy would put heads second.
    of_head = (table[:, None] + pages * jnp.arange(heads)[:, None]).reshape(batch * heads, 1, -1, 1).astype(jnp.int32)
    one, none = jnp.ones(batch * heads, jnp.int32), jnp.zeros(0, query.dtype)
    arguments = {
        "query": query.reshape(batch * heads, queries, 1, head_dim),
        "key": keys.reshape(-1, 1, *keys.shape[2:]),
        "value": values.reshape(-1, 1, *values.shape[2:]),
        "bias": none,
        "q_seqlen": one,
        "kv_seqlen": jnp.repeat(last + 1, heads).astype(jnp.int32),
        "q_offsets": none,
        "kv_offsets": none,
        "page_table_k": of_head,
        "page_table_v": of_head,
        "score_mod_args": (),
        "scale": head_dim**-0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": cudnn.MaskType.PADDING,
        "layout": cudnn.AttentionLayout.BNTH.value,
        "sliding_window_length": None,
        "score_mod": None,
        "cudnn_version": cudnn.check_cudnn_version(),
        "return_residual": False,
    }
    # Its public function insists on as many pages as the tables of all rows have entries, for which cuDNN has no need.
    function = cudnn._dot_product_attention
    return function(*(arguments[name] for name in inspect.signature(function).parameters)).reshape(query.shape)


def triton_paged_attention(
    query: Float[Array, "batch kv_heads queries head_dim"],
    keys: Quantised,
    values: Quantised,
    table: Int[Array, "batch row_pages"],
    last: Int[Array, " batch"],
) -> Float[Array, "batch kv_heads queries head_dim"]:
    """GPU's attention of one token in each row over its tokens 0..last in int8 pages; head_dim is a power of two."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    batch, heads, queries, head_dim = query.shape
    splits = math.gcd(table.shape[1], _SPLITS)
    out = paged_attention(
        query.reshape(batch, heads * queries, head_dim) * head_dim**-0.5,
        keys.integers,
        values.integers,
        table.astype(jnp.int32),
        (last + 1).astype(jnp.int32),
        keys.scales,
        values.scales,
        k_splits=splits,
        pages_per_compute_block=math.gcd(table.shape[1] // splits, _PAGES_AT_ONCE),
    )
    return out.reshape(query.shape)


def tpu_paged_attention(
    query: Float[Array, "batch kv_heads queries head_dim"],
    keys: CachedHeads,
    values: CachedHeads,
    table: Int[Array, "batch row_pages"],
    last: Int[Array, " batch"],
) -> Float[Array, "batch kv_heads queries head_dim"]:
    """TPU's attention of one token in each row over its tokens 0..last; head_dim is a multiple of 128."""
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    batch, heads, queries, head_dim = query.shape
    # Where a chip's memory has room for a layer's pages, they were brought there whole, and written back at each step.
    keys, values = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (keys, values))
    out = paged_attention(
        query.reshape(batch, heads * queries, head_dim) * head_dim**-0.5,
        keys,
        values,
        last + 1,
        table,
        pages_per_compute_block=math.gcd(table.shape[1], _PAGES_PER_BLOCK),
    )
    return out.reshape(query.shape)
