"""Where runs of one request under several budgets part, so that each decodes only what is its own.

The draw of a step depends on the request, the position and the tokens before it. So two runs have the same tokens up to
the first step at which their rules differ: where one's budget is spent, or where an end attempt is treated in two ways.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxtyping import Int

from s1jax.decoding.budget import RowParams


class WaitTexts(NamedTuple):
    """The texts that may be forced, as `budget.Tables` has them, on the host."""

    ids: Int[Any, "texts text_length"]
    lengths: Int[Any, " texts"]

    def of(self, params: RowParams, count: int) -> tuple[int, ...]:
        """The ids that a row with these settings writes for its end attempt after `count` suppressed ones."""
        text = int(params.wait_start) + count % int(params.wait_count)
        return tuple(self.ids[text, : self.lengths[text]].tolist())


@dataclass(frozen=True)
class Rules:
    """The settings of one run, from its row of the batch's, and the texts that they point to."""

    params: RowParams
    texts: WaitTexts

    def treats(self, num_waits: int, num_thinking_tokens: int) -> tuple[int, ...] | Literal["redraw", "end"]:
        """What becomes of an end attempt: a wait text, a second draw, or the end of thinking."""
        wait = self.texts.of(self.params, num_waits)
        fits = num_thinking_tokens + len(wait) + 1 <= self.params.max_thinking_tokens
        if num_waits < self.params.num_ignore and fits:
            return wait
        return "redraw" if num_thinking_tokens < self.params.min_thinking_tokens else "end"


class Fork(NamedTuple):
    """The step at which a run begins to differ from another."""

    step: int
    """Of the output, from 0: so many tokens are the same."""
    num_waits: int
    """Suppressed end attempts before it."""


def fork(done: Rules, rules: Rules, attempts: list[int], num_steps: int, before: int) -> Fork | None:
    """Where a run with `rules` parts from a finished one; None if it does not.

    They are of one request, and may differ in how they think, not in how they answer.

    Args:
        done: the settings of the finished run.
        rules: those of the other.
        attempts: the steps of the finished run at which an end of thinking was drawn, ascending.
        num_steps: its output tokens.
        before: thinking tokens in the prompt.
    """
    spent = [max(0, int(of.params.max_thinking_tokens) - before) for of in (done, rules)]
    num_waits = 0
    for step in attempts:
        if step >= min(spent):
            break
        treatment = done.treats(num_waits, before + step)
        if treatment != rules.treats(num_waits, before + step):
            return Fork(step, num_waits)
        if treatment == "end":
            return None
        num_waits += treatment != "redraw"
    # A run that the context length has cut short never got there.
    return None if spent[0] == spent[1] or min(spent) >= num_steps else Fork(min(spent), num_waits)
