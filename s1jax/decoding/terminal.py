"""Generated text on a terminal as it comes, forced tokens in another colour."""

from typing import TextIO

from transformers import PreTrainedTokenizerBase

from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished, Progress

_FORCED, _PLAIN = "\x1b[33m", "\x1b[0m"


class TerminalWriter:
    """Writes requests one after the other, in order; what comes for a later one waits its turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, requests: list[Request], out: TextIO):
        """Write to `out`, in colour if it is a terminal."""
        self._tokenizer, self._out, self._colour = tokenizer, out, out.isatty()
        self._order = [(r.index, r.sample) for r in requests]
        self._held: dict[tuple[int, int], list[tuple[int, bool]]] = {key: [] for key in self._order}
        self._finished: dict[tuple[int, int], str] = {}

    def take(self, event: Progress | Finished) -> None:
        """Write what can be written now."""
        key = (event.request.index, event.request.sample)
        if isinstance(event, Progress):
            self._held[key] += zip(event.output_ids, event.forced, strict=True)
        else:
            g = event.generation
            self._finished[key] = (
                f"\n[{g.num_thinking_tokens} thinking tokens, {g.num_waits} waits, ended by {g.thinking_end}; "
                f"{g.num_answer_tokens} answer tokens, {g.finish_reason}]\n\n"
            )
        while self._order:
            first = self._order[0]
            self._write(first, flush_all=first in self._finished)
            if first not in self._finished:
                break
            self._out.write(self._finished[first])
            self._order.pop(0)
        self._out.flush()

    def _write(self, key: tuple[int, int], flush_all: bool) -> None:
        """Write runs of equally forced tokens; the last run is held back while it ends within a character."""
        held = self._held[key]
        while held:
            forced = held[0][1]
            run = next((i for i, (_, flag) in enumerate(held) if flag != forced), len(held))
            text = self._tokenizer.decode([token for token, _ in held[:run]], skip_special_tokens=False)
            if run == len(held) and text.endswith("\ufffd") and not flush_all:
                return
            self._out.write(f"{_FORCED}{text}{_PLAIN}" if forced and self._colour else text)
            del held[:run]
