"""Keys and values of past tokens in pages, of which each row has a list, and attention of new tokens over them.

A row is given pages as it grows, so that memory follows what rows hold and not what they could; full pages may be in
the lists of several rows. Each shard of a batch has pages and page numbers of its own. Pages of int8 are widened inside
the products, or a few at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from s1jax.config import CacheDtype, Implementation
from s1jax.mesh import LOGICAL_AXES, platform
from s1jax.model import cpu_kernel
from s1jax.model.accelerator_attention import (
    Heads,
    KeyValueHeads,
    cudnn_paged_attention,
    tpu_paged_attention,
    triton_paged_attention,
)
from s1jax.model.block_attention import MASKED, add_block, no_blocks, product
from s1jax.model.config import QwenConfig
from s1jax.model.projection import precision_of
from s1jax.model.quantised_heads import Quantised, quantised, widened

PAGE = 64
"""Tokens of a page."""
_PAGES_PER_BLOCK = 16
"""Pages that several tokens of a row attend to together."""
UNUSED_PAGE = 0
"""Belongs to no row: what need not be kept is written there."""

Pages = Float[Array, "kv_heads pages slots head_dim"] | Quantised
PageTable = Int[Array, "batch row_pages"]
"""Of each row, the pages of its tokens in their order, then UNUSED_PAGE."""


class LayerCache(NamedTuple):
    """One layer's keys and values; slot s of the n-th page in a row's list is of its token at position n * PAGE + s.

    Heads come first, as kernels want one head's pages together, and none copies them to have them so.
    """

    keys: Pages
    values: Pages


KVCache = tuple[LayerCache, ...]
"""The caches of all layers, one array each: reading a slice of a stack costs a copy on every platform."""
CACHE_AXES = ("kv_heads", "pages", "slots", "head_dim")

_BATCH, _TENSOR = LOGICAL_AXES["batch"], LOGICAL_AXES["heads"]
_CACHE, _ROWS = PartitionSpec(_TENSOR, _BATCH), PartitionSpec(_BATCH)


def num_pages(tokens: int) -> int:
    """Pages that so many tokens of a row fill or begin."""
    return -(-tokens // PAGE)


def abstract_cache(
    config: QwenConfig, dtype: DTypeLike, cache_dtype: CacheDtype | None, pages: int, tensor: int
) -> LayerCache:
    """Shapes and dtypes of one layer's cache, on all devices together; its dtype is `dtype` unless it has one itself.

    Where there are fewer heads than shards of the tensor axis, each shard has its own copy of one.
    """
    shape = (max(config.num_key_value_heads, tensor), pages, PAGE, config.head_dim)
    either: Any = jax.ShapeDtypeStruct(shape, cache_dtype or dtype)
    if cache_dtype:
        scales: Any = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
        either = Quantised(either, scales)
    return LayerCache(either, either)


def write(
    cache: LayerCache,
    key: KeyValueHeads,
    value: KeyValueHeads,
    table: PageTable,
    positions: Int[Array, "batch length"],
) -> LayerCache:
    """The cache with these tokens, one after the other in each row, at their positions.

    Several begin with a page; what is beyond the table is not kept.
    """
    heads = _num_heads(cache.keys)

    def put(pages: Array, new: Array, table: PageTable, positions: Array) -> Array:
        if cpu_kernel.available(pages.dtype):
            return cpu_kernel.write(pages, new, table, positions[:, 0])
        # Places of all heads are one axis, and the first: by another, TPUs copy the pages to write to them.
        first = pages.shape[1] * jnp.arange(pages.shape[0])[:, None]
        if new.shape[1] == 1:
            page = jnp.take_along_axis(table, positions // PAGE, axis=1)[:, 0]
            slots = pages.reshape(-1, *pages.shape[3:])
            slots = slots.at[(first + page) * PAGE + positions[:, 0] % PAGE].set(new[:, 0].swapaxes(0, 1))
            return slots.reshape(pages.shape)
        count = num_pages(new.shape[1])
        new = jnp.pad(new, [(0, 0), (0, count * PAGE - new.shape[1])] + [(0, 0)] * (new.ndim - 2))
        new = new.reshape(new.shape[0], count, PAGE, *new.shape[2:])
        at = positions[:, :1] // PAGE + jnp.arange(count)
        own = jnp.take_along_axis(table, at, axis=1, mode="fill", fill_value=UNUSED_PAGE)
        of_heads = pages.reshape(-1, *pages.shape[2:])
        return of_heads.at[first[..., None] + own].set(jnp.moveaxis(new, 3, 0)).reshape(pages.shape)

    new_heads = PartitionSpec(_BATCH, None, _TENSOR)
    put_all = _on_shards(put, (_CACHE, new_heads, _ROWS, _ROWS), _CACHE)
    copies = heads // key.shape[2]

    def put_heads(pages: Array, new: Array) -> Array:
        written: Array = put_all(pages, jnp.repeat(new, copies, axis=2), table, positions)
        return written

    is_quantised = isinstance(cache.keys, Quantised)
    tokens = LayerCache(quantised(key), quantised(value)) if is_quantised else LayerCache(key, value)
    return jax.tree.map(put_heads, cache, tokens)


def as_kept(cache: LayerCache, x: KeyValueHeads) -> KeyValueHeads:
    """Keys or values as they are once they are in the cache, so that it makes no difference where they were read."""
    return widened(quantised(x), x.dtype) if isinstance(cache.keys, Quantised) else x


def copy_page(layer: LayerCache, source: Int[Array, " shards"], target: Int[Array, " shards"]) -> LayerCache:
    """One page of each shard copied onto another."""

    def copy(layer: LayerCache, source: Array, target: Array) -> LayerCache:
        return jax.tree.map(lambda pages: pages.at[:, target].set(pages[:, source]), layer)

    copied: LayerCache = _on_shards(copy, (_CACHE, _ROWS, _ROWS), _CACHE)(layer, source, target)
    return copied


def paged_attention(
    query: Heads,
    cache: LayerCache,
    table: PageTable,
    positions: Int[Array, "batch length"],
    *,
    implementation: Implementation = "auto",
) -> Heads:
    """Attention of tokens over those of their rows up to themselves, scaled by 1/sqrt(head_dim); softmax in float32.

    Of one token in each row, "auto" takes the kernel that reads nothing but those, where there is one (`choose_paged`);
    any other implementation gathers all pages of the table. Several tokens, one after the other, see pages that were
    written for tokens up to the last of them.
    """
    batch, length, _, head_dim = query.shape
    is_quantised = isinstance(cache.keys, Quantised)
    name = choose_paged(query.dtype, head_dim, is_quantised) if implementation == "auto" else implementation
    grouped = query.reshape(batch, length, _num_heads(cache.keys), -1, head_dim)
    if length == 1:
        kernels = QUANTISED_KERNELS if is_quantised else KERNELS
        kernel, grouped, positions = kernels.get(name, _gathered), grouped[:, 0], positions[:, 0]
        rows = PartitionSpec(_BATCH, _TENSOR)
    else:
        kernel, rows = _each_token if name == "kernel" else _in_blocks, PartitionSpec(_BATCH, None, _TENSOR)
    attend = _on_shards(kernel, (rows, _CACHE, _CACHE, _ROWS, _ROWS), rows)
    return attend(grouped, *cache, table, positions).astype(query.dtype).reshape(query.shape)


def choose_paged(dtype: DTypeLike, head_dim: int, is_quantised: bool) -> Implementation:
    """What "auto" takes on the platform compiled for; "plain" gathers."""
    if cpu_kernel.available(dtype):
        return "kernel"
    # The accelerators' kernels multiply float32 in less than float32.
    if dtype != jnp.float32:
        # Triton's blocks are powers of two.
        if platform() in ("gpu", "cuda") and (not is_quantised or head_dim.bit_count() == 1):
            return "cudnn"
        if platform() == "tpu" and head_dim % 128 == 0 and not is_quantised:
            return "splash"
    return "plain"


def _num_heads(pages: Pages) -> int:
    return (pages.integers if isinstance(pages, Quantised) else pages).shape[0]


def _on_shards(function: Callable[..., Any], in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec) -> Any:
    """The function on each device's own rows, heads and pages, whose numbers mean nothing elsewhere."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _of_rows(pages: Pages, table: PageTable) -> Any:
    """A copy of the rows' pages, in their order: (batch, kv_heads, tokens, head_dim), and scales without the last."""

    def gather(pages: Array) -> Array:
        # From (heads, rows, pages, slots, head_dim).
        gathered = pages[:, table].swapaxes(0, 1)
        return gathered.reshape(*gathered.shape[:2], -1, *pages.shape[3:])

    return jax.tree.map(gather, pages)


def _gathered(
    query: Float[Array, "batch kv_heads queries head_dim"], keys: Pages, values: Pages, table: PageTable, last: Array
) -> Float[Array, "batch kv_heads queries head_dim"]:
    """The formula, over a copy of the pages."""
    head_dim = query.shape[-1]
    key, value = _of_rows(keys, table), _of_rows(values, table)
    product_of = partial(jnp.einsum, precision=precision_of(query), preferred_element_type=jnp.float32)
    if isinstance(key, Quantised):
        scores = product_of("bkgd,bksd->bkgs", query, key.integers.astype(query.dtype)) * key.scales[:, :, None]
    else:
        scores = product_of("bkgd,bksd->bkgs", query, key)
    seen = jnp.arange(scores.shape[3]) <= last[:, None, None, None]
    scores = jnp.where(seen, scores * head_dim**-0.5, -jnp.inf)
    # Divided by their sum only after the product: one pass less over the scores, which are as long as the rows.
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # What others left in these pages may be no numbers, which a weight of zero would not keep out.
    if isinstance(value, Quantised):
        weights *= jnp.where(seen, value.scales[:, :, None], 0)
        value = value.integers.astype(query.dtype)
    else:
        value = jnp.where(jnp.swapaxes(seen, 2, 3), value, 0)
    context = product_of("bkgs,bksd->bkgd", weights.astype(value.dtype), value)
    return context / total


Piece = Float[Array, "batch length kv_heads group head_dim"]
"""Several tokens of each row, one after the other."""


def _each_token(query: Piece, keys: Pages, values: Pages, table: PageTable, positions: Array) -> Piece:
    """As if each token were a row: they find the pages that they share in the processor's caches."""
    length, end = query.shape[1], PAGE * table.shape[1]
    tokens = query.reshape(-1, *query.shape[2:])
    # What is beyond the table is padding.
    last = jnp.minimum(positions, end - 1).ravel()
    return _kernel(tokens, keys, values, jnp.repeat(table, length, axis=0), last).reshape(query.shape)


def _in_blocks(query: Piece, keys: Pages, values: Pages, table: PageTable, positions: Array) -> Piece:
    """Block by block of the pages up to the last token's: what a table has beyond them costs nothing."""
    batch, length, heads, group, head_dim = query.shape
    # The rows of a head are its tokens, for one query of the group after the other.
    queries = (query * head_dim**-0.5).transpose(0, 2, 3, 1, 4).reshape(batch, heads, group * length, head_dim)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % _PAGES_PER_BLOCK)), constant_values=UNUSED_PAGE)
    block = _PAGES_PER_BLOCK * PAGE

    def add(i: Array, sums: Any) -> Any:
        pages = jax.lax.dynamic_slice_in_dim(table, i * _PAGES_PER_BLOCK, _PAGES_PER_BLOCK, axis=1)
        key, value = (widened(_of_rows(x, pages), query.dtype) for x in (keys, values))
        slots = i * block + jnp.arange(block)
        # What others left in pages may be no numbers, which a weight of zero would not keep out.
        written = jnp.repeat(pages != UNUSED_PAGE, PAGE, axis=1) & (slots <= positions[:, -1:])
        value = jnp.where(written[:, None, :, None], value, 0)
        seen = jnp.tile(slots <= positions[..., None], (1, group, 1))
        return add_block(sums, jnp.where(seen[:, None], product(queries, key.swapaxes(2, 3)), MASKED), value)

    blocks = jnp.minimum(jnp.max(positions) // block + 1, table.shape[1] // _PAGES_PER_BLOCK)
    _, total, context = jax.lax.fori_loop(0, blocks, add, no_blocks(queries.shape))
    out = (context / total[..., None]).reshape(batch, heads, group, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4)


def _kernel(query: Array, keys: Pages, values: Pages, table: PageTable, last: Array) -> Array:
    return cpu_kernel.attend(query.astype(jnp.float32) * query.shape[-1] ** -0.5, keys, values, table, last)


KERNELS: dict[str, Callable[..., Array]] = {
    "kernel": _kernel,
    "cudnn": cudnn_paged_attention,
    "splash": tpu_paged_attention,
}
QUANTISED_KERNELS: dict[str, Callable[..., Array]] = {"kernel": _kernel, "cudnn": triton_paged_attention}
"""Over pages of int8, which cuDNN does not take."""
