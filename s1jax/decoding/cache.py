"""The keys and values of a batch's rows: memory is claimed once, and rows are given pages of it as they grow."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from s1jax.decoding.loop import copy_pages, empty_cache, prefill
from s1jax.decoding.pages import PagePool
from s1jax.device_memory import GIB, free_bytes
from s1jax.mesh import batch_shards
from s1jax.model.load import LoadedModel
from s1jax.model.paged_attention import PAGE, UNUSED_PAGE, KVCache, cache_shape, choose_paged, num_pages
from s1jax.processes import agree_least

SHORTEST_PROMPT, _SHORTEST_ROW = 64, 128
_SHARE_OF_FREE_MEMORY = {"cpu": 0.25}
"""How much of what is free a cache may take by itself; by platform, 0.8 of an accelerator's."""
_MOST_ON_CPU = 2 * GIB
"""Of a cache by itself, unless one row needs more: there it takes time to fill memory with zeros."""
_TABLE_STEP = 8
"""Pages of which a table's width is a multiple: TPU's kernel computes so many together."""


class PagedCache:
    """The cache of `batch` rows, equally many on each shard, which have pages of their own.

    Calls that compute are made under the mesh; rows are changed between two steps, and by the host alone.
    """

    def __init__(self, loaded: LoadedModel, batch: int, tokens: int | None, *, share: bool):
        """Nothing is claimed yet. `tokens` are the most of all rows together; None: what the device's memory allows.

        With `share`, rows whose prompts are the same use the same pages for them.
        """
        self._loaded, self._share = loaded, share
        self._shards = batch_shards(loaded.mesh)
        self._per_shard = batch // self._shards
        self._context = loaded.model.config.max_position_embeddings
        self._most = num_pages(-(-tokens // self._shards)) if tokens else None
        self._pools: list[PagePool] = []
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._prompts: list[tuple[int, ...]] = [()] * batch
        """What each row began with, and was prefilled with alone."""
        self._to_prefill: list[tuple[int, tuple[int, ...]]] = []
        self._to_copy: list[tuple[int, int, int]] = []
        """Shard, and the pages from and to."""
        self.asked = self.limit = 0
        """Tokens that memory was claimed for in a row, and that a row may grow to."""
        self.arrays: KVCache | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Pages that rows use, and all that there are."""
        used = sum(pool.num_used for pool in self._pools)
        return used, used + sum(pool.num_free for pool in self._pools)

    def claim(self, limit: int) -> None:
        """Have memory for rows of up to `limit` tokens, all of them full if possible. No row may be at work."""
        self.arrays = None
        most = self._per_shard * num_pages(limit)
        pages = min(most, self._allowed(limit) if self._most is None else self._most)
        self.asked, self.limit = limit, min(limit, pages * PAGE)
        self._pools = [PagePool(pages + 1) for _ in range(self._shards)]
        self.arrays = empty_cache(self._loaded.model, self._shards * (pages + 1))

    def _allowed(self, limit: int) -> int:
        """Pages of a shard that the devices' memory has room for, with rows of up to `limit` tokens."""
        model, mesh = self._loaded.model, self._loaded.mesh
        values = math.prod(cache_shape(model.config, 1, mesh.shape["tensor"])) // mesh.shape["tensor"]
        size = 2 * model.config.num_hidden_layers * values * np.dtype(model.dtype).itemsize
        where = mesh.devices.flat[0].platform
        share = _SHARE_OF_FREE_MEMORY.get(where, 0.8)
        pages = min(int(share * free_bytes(device)) // size for device in mesh.local_devices)
        if where == "cpu":
            pages = min(pages, max(_MOST_ON_CPU // size, num_pages(limit) + 1))
        everywhere = len({device.process_index for device in mesh.devices.flat}) > 1
        # Beside the page that is nobody's.
        return (agree_least(pages) if everywhere else pages) - 1

    def admits(self, row: int, tokens: int) -> bool:
        """Whether an empty row could take so many tokens, and each other row of its shard one page more."""
        beside = sum(bool(self._pages[other]) for other in self.neighbours(row))
        return num_pages(tokens) + beside <= self._pool(row).num_free

    def begin(self, row: int, context_ids: tuple[int, ...], tokens: int, *, is_prompt: bool) -> None:
        """Give an empty row its context, and pages for so many tokens, which it has room for; `fill` computes them.

        What is not a prompt is computed for this row alone.
        """
        alike = (other for other in self.neighbours(row) if self._prompts[other] == context_ids)
        donor = next(alike, None) if is_prompt and self._share else None
        whole = (len(context_ids) - 1) // PAGE
        if donor is not None:
            self._pages[row] = self._pages[donor][:whole]
            self._pool(row).share(self._pages[row])
        has_room = self.extend(row, tokens)
        assert has_room
        if donor is None:
            self._to_prefill.append((row, context_ids))
        else:
            # The page of the last token is written to: it is copied with what comes before in it.
            self._to_copy.append((row // self._per_shard, self._pages[donor][whole], self._pages[row][whole]))
        self._prompts[row] = context_ids if is_prompt else ()

    def extend(self, row: int, tokens: int) -> bool:
        """Give a row pages for so many tokens; False, and nothing is changed, if there are not enough."""
        pages = self._pool(row).take(max(0, num_pages(tokens) - len(self._pages[row])))
        self._pages[row] += pages or []
        return pages is not None

    def shorten(self, row: int, tokens: int) -> None:
        """Take back what a row has beyond the pages of so many tokens."""
        kept = num_pages(tokens)
        self._pool(row).release(self._pages[row][kept:])
        del self._pages[row][kept:]

    def release(self, row: int) -> None:
        """Take back a row's pages."""
        self.shorten(row, 0)
        self._prompts[row] = ()

    def fill(self) -> None:
        """Compute the keys and values of all contexts that were begun: in each shard one at a time."""
        while self._to_prefill:
            length = self._padded_length(self._to_prefill[0][1])
            prompt_ids = np.zeros((self._shards, length), np.int32)
            table = np.full((self._shards, num_pages(length)), UNUSED_PAGE, np.int32)
            taken: set[int] = set()
            left = []
            for row, context_ids in self._to_prefill:
                shard = row // self._per_shard
                if shard in taken or self._padded_length(context_ids) != length:
                    left.append((row, context_ids))
                    continue
                taken.add(shard)
                prompt_ids[shard, : len(context_ids)] = context_ids
                pages = self._pages[row][: num_pages(len(context_ids))]
                table[shard, : len(pages)] = pages
            self.arrays = prefill(self._loaded.model, self._loaded.params, self._claimed, prompt_ids, table)
            self._to_prefill = left
        for shard, source, target in self._to_copy:
            pages_of_shards = np.full((2, self._shards), UNUSED_PAGE, np.int32)
            pages_of_shards[:, shard] = source, target
            self.arrays = copy_pages(self._claimed, *pages_of_shards)
        self._to_copy = []

    def table(self, rows: Sequence[int], tokens: int) -> Int[np.ndarray, "rows row_pages"]:
        """The pages of these rows, of which none has more than so many tokens.

        What attention costs without a kernel follows its width, and how often programs are compiled too.
        """
        model = self._loaded.model
        kernel = choose_paged(model.dtype, model.config.head_dim) != "plain"
        width = num_pages(self.limit if kernel else bucket(tokens, self.limit))
        width += -width % _TABLE_STEP if kernel else 0
        table = np.full((len(rows), width), UNUSED_PAGE, np.int32)
        for row, pages in zip(table, (self._pages[row] for row in rows), strict=True):
            row[: len(pages)] = pages
        return table

    @property
    def _claimed(self) -> KVCache:
        assert self.arrays is not None
        return self.arrays

    def _pool(self, row: int) -> PagePool:
        return self._pools[row // self._per_shard]

    def neighbours(self, row: int) -> range:
        """The rows of the same shard, itself among them."""
        first = row - row % self._per_shard
        return range(first, first + self._per_shard)

    def _padded_length(self, context_ids: Sequence[int]) -> int:
        return bucket(len(context_ids), self._context, shortest=SHORTEST_PROMPT)


def bucket(length: int, limit: int, shortest: int = _SHORTEST_ROW) -> int:
    """The size of rows or padded prompts for this many tokens: a power of two or 3/4 of one, at most `limit`."""
    size = shortest
    while size < length:
        size *= 2
    if size > shortest and length <= size * 3 // 4:
        size = size * 3 // 4
    return min(size, limit)
