"""The keys and values of a batch's rows: memory is claimed once, and rows are given pages of it as they grow."""

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from s1jax.decoding.loop import copy_pages, empty_cache, prefill
from s1jax.decoding.pages import PagePool, bucket
from s1jax.decoding.prefill_queue import PIECE, SHORTEST_PIECE, Piece, PrefillQueue
from s1jax.device_memory import GIB, free_bytes
from s1jax.mesh import batch_shards
from s1jax.model.load import LoadedModel
from s1jax.model.paged_attention import PAGE, UNUSED_PAGE, KVCache, choose_paged, num_pages
from s1jax.processes import agree_least

_SHARE_OF_FREE_MEMORY = {"cpu": 0.25}
"""How much of what is free a cache may take by itself; by platform, 0.8 of an accelerator's."""
_MOST_ON_CPU = 2 * GIB
"""Of a cache by itself, unless one row needs more: there it takes time to fill memory with zeros."""
_TABLE_STEP = 8
"""Pages of which a table's width is a multiple: TPU's kernel computes so many together."""


class Occupancy(NamedTuple):
    """What an engine holds between two steps."""

    rows: int
    """At work."""
    live_tokens: int
    """In the contexts of these rows."""
    used_pages: int
    pages: int


class PagedCache:
    """The cache of `batch` rows, equally many on each shard, which have pages of their own.

    Calls that compute are made under the mesh; rows are changed between two steps, and by the host alone.
    """

    def __init__(self, loaded: LoadedModel, batch: int, tokens: int | None, *, share: bool):
        """Nothing is claimed yet. `tokens` are the most of all rows together; None: what the device's memory allows.

        With `share`, rows whose contexts begin alike use the same pages for what they have in common.
        """
        self._loaded, self._share = loaded, share
        self._shards = batch_shards(loaded.mesh)
        self._per_shard = batch // self._shards
        self._context = loaded.model.config.max_position_embeddings
        self._most = num_pages(-(-tokens // self._shards)) if tokens else None
        self._pools: list[PagePool] = []
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._beginnings: list[tuple[int, ...]] = [()] * batch
        """Of each row's context, what others may share: it is never written to again, but for its last token."""
        self._queues: list[PrefillQueue] = []
        """Of each shard."""
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
        self._queues = [PrefillQueue(pool) for pool in self._pools]
        self.arrays = empty_cache(self._loaded.model, self._shards * (pages + 1))

    def _allowed(self, limit: int) -> int:
        """Pages of a shard that the devices' memory has room for, with rows of up to `limit` tokens."""
        model, mesh = self._loaded.model, self._loaded.mesh
        layer = jax.tree.leaves(model.abstract_cache(1, mesh.shape["tensor"]))
        size = sum(x.size * x.dtype.itemsize for x in layer) // mesh.shape["tensor"] * model.config.num_hidden_layers
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

    def begin(self, row: int, context_ids: tuple[int, ...], tokens: int, *, prompt_length: int) -> None:
        """Give an empty row its context, and pages for so many tokens, which it has room for; `fill` computes them."""
        beginning = context_ids
        if prompt_length < len(context_ids):
            # It may go back to where its prompt ends, and the last piece of that was computed with what follows.
            beginning = context_ids[: (prompt_length - 1) // PIECE * PIECE + 1]
        donor, shared = self._donor(row, beginning)
        pages = self._pages[row] = self._pages[donor][:shared]
        self._pool(row).share(pages)
        has_room = self.extend(row, tokens)
        assert has_room
        queue = self._queues[row // self._per_shard]
        if self._beginnings[donor] == context_ids:
            # The page of the last token is written to: it is copied with what comes before in it.
            queue.add_copy(row, self._pages[donor][shared], pages[shared])
        else:
            queue.add_context(row, context_ids, shared * PAGE, pages)
        self._beginnings[row] = beginning

    def _donor(self, row: int, beginning: tuple[int, ...]) -> tuple[int, int]:
        """The row whose beginning has most in common with this one, and how many of its pages can be shared."""
        donor, most = row, 0
        # The page of the last token is written to by its row.
        whole = (len(beginning) - 1) // PAGE
        for other in self.neighbours(row) if self._share else ():
            theirs = self._beginnings[other]
            if theirs == beginning:
                return other, whole
            pieces = 0
            while (end := (pieces + 1) * PIECE) < min(len(theirs), len(beginning)) and (
                theirs[end - PIECE : end] == beginning[end - PIECE : end]
            ):
                pieces += 1
            donor, most = max((donor, most), (other, pieces * num_pages(PIECE)), key=itemgetter(1))
        return donor, most

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
        self._beginnings[row] = ()
        if self._queues:
            self._queues[row // self._per_shard].drop(row)

    @property
    def unfilled(self) -> set[int]:
        """Rows whose contexts are not all computed."""
        return {row for queue in self._queues for row in queue.rows}

    def fill(self, most: int | None) -> None:
        """Compute contexts that were begun, in each shard a piece at a time: so many tokens, with padding, or all."""
        spent = 0
        while any(self._queues) and (most is None or spent + PIECE <= most):
            head = max(self._queues, key=len).head
            if isinstance(head, Piece):
                self._compute(head, [queue.take_like(head) for queue in self._queues])
                spent += head.length
            else:
                copies = [queue.take_like(head) for queue in self._queues]
                pages = [(copy.source, copy.target) if copy else (UNUSED_PAGE, UNUSED_PAGE) for copy in copies]
                self.arrays = copy_pages(self._claimed, *np.array(pages, np.int32).T)

    def compile(self) -> None:
        """Have all programs of `fill`, by running each for nobody."""
        firsts = {bucket(tokens, PIECE, SHORTEST_PIECE) for tokens in range(1, self.limit + 1)}
        for length in sorted(firsts):
            self._compute(Piece(0, (0,) * length, 0, []), [])
        if self.limit > PIECE:
            self._compute(Piece(0, (0,), PIECE, []), [])
        nowhere = np.full(self._shards, UNUSED_PAGE, np.int32)
        self.arrays = copy_pages(self._claimed, nowhere, nowhere)

    def _compute(self, like: Piece, pieces: Sequence[Piece | None]) -> None:
        """Of each shard at most one piece, of the kind of this one."""
        token_ids = np.zeros((self._shards, like.length), np.int32)
        table = np.full((self._shards, num_pages(self.limit if like.first else like.length)), UNUSED_PAGE, np.int32)
        first = np.zeros(self._shards, np.int32)
        for shard, piece in enumerate(pieces):
            if piece:
                token_ids[shard, : len(piece.token_ids)] = piece.token_ids
                table[shard, : len(piece.pages)] = piece.pages
                first[shard] = piece.first
        self.arrays = prefill(self._loaded.model, self._loaded.params, self._claimed, token_ids, first, table)

    def table(self, rows: Sequence[int], tokens: int) -> Int[np.ndarray, "rows row_pages"]:
        """The pages of these rows, of which none has more than so many tokens.

        What attention costs without a kernel follows its width, and how often programs are compiled too.
        """
        model = self._loaded.model
        kernel = choose_paged(model.dtype, model.config.head_dim, model.cache_dtype is not None) != "plain"
        width = num_pages(self.limit if kernel else bucket(tokens, self.limit))
        width += -width % _TABLE_STEP if kernel else 0
        table = np.full((len(rows), width), UNUSED_PAGE, np.int32)
        unfilled = self.unfilled
        for column, row in enumerate(rows):
            # Nobody decodes in a row that is being filled, and what nobody writes is not for its pages.
            if row not in unfilled:
                table[column, : len(self._pages[row])] = self._pages[row]
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
