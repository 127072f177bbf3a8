"""What must be done before rows can decode: their contexts are computed piece by piece, and pages are copied.

Numbers only, nothing of a device.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from s1jax.decoding.pages import PagePool, bucket
from s1jax.model.paged_attention import PAGE, UNUSED_PAGE, num_pages

PIECE = 8 * PAGE
"""Tokens of a context that are computed together: enough that multiplying takes longer than reading the weights, on any
accelerator. Contexts that begin alike share whole pieces, whose numbers are then those of each alone.
"""
SHORTEST_PIECE = PAGE
_NOBODY = -1
"""In place of a row that was released."""


class Piece(NamedTuple):
    """Tokens of a row's context, whose keys and values are to be computed."""

    row: int
    token_ids: tuple[int, ...]
    first: int
    """The position of the first of them."""
    pages: list[int]
    """The row's, up to those of the last of them."""

    @property
    def length(self) -> int:
        """With padding; one program computes all pieces that others come before."""
        return PIECE if self.first else bucket(len(self.token_ids), PIECE, SHORTEST_PIECE)


class Copy(NamedTuple):
    """A page of another row of which a row is to have its own."""

    row: int
    source: int
    target: int


Item = TypeVar("Item", Piece, Copy)


class PrefillQueue:
    """What the rows of one shard wait for, in an order in which everything comes after what it needs."""

    def __init__(self, pool: PagePool):
        self._pool = pool
        self._left: list[Piece | Copy] = []

    def __len__(self) -> int:
        return len(self._left)

    @property
    def rows(self) -> set[int]:
        """Those that wait for something."""
        return {item.row for item in self._left}

    @property
    def head(self) -> Piece | Copy:
        """What comes first."""
        return self._left[0]

    def add_context(self, row: int, context_ids: Sequence[int], first: int, pages: Sequence[int]) -> None:
        """Have a row's context computed from a position on, with which a page begins."""
        for start in range(first, len(context_ids), PIECE):
            token_ids = tuple(context_ids[start : start + PIECE])
            self._left.append(Piece(row, token_ids, start, list(pages[: num_pages(start + len(token_ids))])))

    def add_copy(self, row: int, source: int, target: int) -> None:
        """Have a page copied to one of this row; nobody else is given the source meanwhile."""
        self._pool.share([source])
        self._left.append(Copy(row, source, target))

    def take_like(self, other: Item) -> Item | None:
        """Take out the first that one program can do together with another shard's `other`, if there is one."""
        for i, item in enumerate(self._left):
            # The first piece of a context needs nothing that is before it here.
            is_next = i == 0 or (isinstance(item, Piece) and item.first == 0)
            if is_next and isinstance(item, type(other)) and _shape(item) == _shape(other):
                del self._left[i]
                if isinstance(item, Copy):
                    self._pool.release([item.source])
                return item
        return None

    def drop(self, row: int) -> None:
        """Leave out what only a row waits for whose pages were just released."""
        self._pool.release([item.source for item in self._left if isinstance(item, Copy) and item.row == row])
        self._left = list(self._without(row))

    def _without(self, row: int) -> Iterator[Piece | Copy]:
        for item in self._left:
            if item.row not in (row, _NOBODY):
                yield item
            elif isinstance(item, Piece):
                # Others may have shared these pages before they were filled; what is free may be anyone's next.
                pages = [page if self._pool.is_used(page) else UNUSED_PAGE for page in item.pages]
                if any(page != UNUSED_PAGE for page in pages[item.first // PAGE :]):
                    yield item._replace(row=_NOBODY, pages=pages)


def _shape(item: Piece | Copy) -> tuple[int, bool]:
    """What the program that does it depends on."""
    return (item.length, item.first > 0) if isinstance(item, Piece) else (0, False)
