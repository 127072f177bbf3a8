"""From output ids, as they come, to the text of thinking and answer: what was sent once stays as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from transformers import PreTrainedTokenizerBase

from s1jax.decoding.profiles import ProfileIds
from s1jax.tokenizer import decode

_PART_OF_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """New text."""

    kind: Literal["reasoning", "content"]
    text: str
    forced: bool
    """Whether the budget wrote it instead of the model."""


class _Text:
    """The text of ids, of which the end is held back while it is within a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        """Ids whose text is out, for what a tokenizer writes otherwise at the beginning of a text."""
        self._held: list[int] = []

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        self._held += ids
        if not self._held:
            return ""
        whole = decode(self._context + self._held, self._tokenizer)
        if whole.endswith(_PART_OF_CHARACTER) and not last:
            return ""
        new = whole[len(decode(self._context, self._tokenizer)) :]
        self._context, self._held = self._held, []
        return new


class AnswerText:
    """The output of one request, of which the model's profile says where the thinking ends and the answer begins.

    The thinking is what `Generation.thinking` has of the output, the answer what `Generation.answer` is, up to the
    first of the texts in `stop`, which are looked for in the answer only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, profile: ProfileIds, stop: Sequence[str] = ()):
        self._tokenizer, self._profile, self._stop = tokenizer, profile, tuple(stop)
        self._thinking, self._answer = _Text(tokenizer), _Text(tokenizer)
        self._ending: list[int] | None = [] if profile.profile.thinks else None
        """What was forced since the thinking ended; None once the answer has begun."""
        self._unsent: list[Piece] = []
        """The answer's last characters, where a stop text may begin."""
        self.num_tokens = 0
        """Taken, of the output."""
        self.stopped = False
        """Whether a stop text has come; nothing is taken any more."""

    def take(self, ids: Sequence[int], forced: Sequence[bool], num_thinking_tokens: int) -> list[Piece]:
        """The text of more ids; of all so far, so many are thinking."""
        thinking = max(0, num_thinking_tokens - self.num_tokens)
        marked = [(token, flag, i < thinking) for i, (token, flag) in enumerate(zip(ids, forced, strict=True))]
        pieces: list[Piece] = []
        for (flag, thinks), run in groupby(marked, key=lambda item: item[1:]):
            tokens = [token for token, _, _ in run]
            if thinks:
                pieces += _piece("reasoning", self._thinking.push(tokens), flag)
                self.num_tokens += len(tokens)
                continue
            pieces += _piece("reasoning", self._thinking.push((), last=True), flag)
            # One at a time where a stop text may come, to know with which.
            for part in [tokens] if not self._stop else [[token] for token in tokens]:
                if not self.stopped:
                    self.num_tokens += len(part)
                    pieces += self._take_answer(part, flag)
        return pieces

    def end(self) -> list[Piece]:
        """What was held back, of an output that is whole."""
        if self.stopped:
            return []
        pieces = [*_piece("reasoning", self._thinking.push((), last=True), False), *self._begin_answer()]
        pieces += self._until_stop(_piece("content", self._answer.push((), last=True), False))
        pieces += self._unsent
        self._unsent = []
        return pieces

    def _take_answer(self, ids: list[int], forced: bool) -> list[Piece]:
        if forced and self._ending is not None:
            self._ending += ids
            return []
        begun = self._begin_answer()
        return begun + self._until_stop(_piece("content", self._answer.push(ids), forced))

    def _begin_answer(self) -> list[Piece]:
        """What the text that was forced at the end of the thinking has of the answer."""
        ending, self._ending = self._ending or [], None
        delimiter = self._profile.profile.end
        if not ending or delimiter not in decode(ending, self._tokenizer):
            return []
        text = self._answer.push(ending, last=True)
        return self._until_stop(_piece("content", text.partition(delimiter)[2], True))

    def _until_stop(self, new: list[Piece]) -> list[Piece]:
        """What may be sent of the answer with these at its end."""
        pieces = self._unsent + new
        if not self._stop or self.stopped:
            return [] if self.stopped else pieces
        text = "".join(piece.text for piece in pieces)
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._unsent = True, []
            return _first_characters(pieces, min(found))[0]
        most = min(len(text), max(map(len, self._stop)) - 1)
        held = next((n for n in range(most, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
        sent, self._unsent = _first_characters(pieces, len(text) - held)
        return sent


def _piece(kind: Literal["reasoning", "content"], text: str, forced: bool) -> list[Piece]:
    return [Piece(kind, text, forced)] if text else []


def _first_characters(pieces: Sequence[Piece], count: int) -> tuple[list[Piece], list[Piece]]:
    """The first so many characters, and the rest."""
    first: list[Piece] = []
    rest: list[Piece] = []
    for piece in pieces:
        first += _piece(piece.kind, piece.text[:count], piece.forced)
        rest += _piece(piece.kind, piece.text[count:], piece.forced)
        count = max(0, count - len(piece.text))
    return first, rest


def joined(pieces: Sequence[Piece], *, by_forced: bool) -> list[Piece]:
    """Neighbours of one kind as one piece; those that were forced and those that were not apart if so asked."""
    runs = groupby(pieces, key=lambda piece: (piece.kind, piece.forced and by_forced))
    return [Piece(kind, "".join(piece.text for piece in run), forced) for (kind, forced), run in runs]
