"""Which pages of a cache are free, and how many rows use each of the others: numbers only, nothing of a device."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from s1jax.model.paged_attention import UNUSED_PAGE

SHORTEST_ROW = 128
"""Tokens that a row has room for at least."""


class PagePool:
    """The pages of one shard of the batch; UNUSED_PAGE is never given out."""

    def __init__(self, count: int):
        """All of `count` pages are free, but for the unused one."""
        self._free = [page for page in range(count - 1, -1, -1) if page != UNUSED_PAGE]
        self._users: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that no row uses."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that one row uses, or several."""
        return len(self._users)

    def is_used(self, page: int) -> bool:
        """Whether any row uses it."""
        return page in self._users

    def take(self, count: int) -> list[int] | None:
        """So many free pages, for one row each; None, and nothing is taken, if there are fewer."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more row uses each of these, which are in use."""
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One row less uses each of these; what nobody uses is free."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                self._free.append(page)


def bucket(length: int, limit: int, shortest: int = SHORTEST_ROW) -> int:
    """The size of rows or padded prompts for this many tokens: a power of two or 3/4 of one, at most `limit`."""
    size = shortest
    while size < length:
        size *= 2
    if size > shortest and length <= size * 3 // 4:
        size = size * 3 // 4
    return min(size, limit)


def full_table(shards: int, rows: int, pages: int) -> Int[np.ndarray, "rows row_pages"]:
    """The table of rows that have so many pages each, of a cache of `shards + rows * pages` pages."""
    of_shard = np.arange(1, rows // shards * pages + 1, dtype=np.int32).reshape(-1, pages)
    return np.tile(of_shard, (shards, 1))
