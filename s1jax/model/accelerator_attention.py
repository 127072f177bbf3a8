"""Causal attention by the kernels of GPUs and TPUs, over packed rows whose examples do not see each other.

They take what one device has: `attention` calls them on each shard's own rows and heads.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Heads = Float[Array, "batch length heads head_dim"]
KeyValueHeads = Float[Array, "batch length kv_heads head_dim"]

TPU_BLOCKS = (512, 256, 128)
"""Tokens of a block of TPU's kernel, the first that divides a row."""


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
    """TPU's flash attention. Blocks above the diagonal are skipped; those of other examples are computed and masked."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, head_dim = query.shape[1:]
    block = next(size for size in TPU_BLOCKS if length % size == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
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

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query * head_dim**-0.5, key, value))
    axes = (0, 0, 0, None if segment_ids is None else 0)
    return jnp.swapaxes(jax.vmap(row, in_axes=axes)(q, k, v, segment_ids), 1, 2)
