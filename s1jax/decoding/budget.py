"""The budget-forcing automaton: when each row stops thinking, and what is written instead of a sample.

`step` is the whole of it: a pure function on arrays, for use inside a compiled decode loop. The host half
(`ThinkingBudget`, `build_tables`, `start_rows`) turns settings and prompts into its arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from transformers import PreTrainedTokenizerBase

from s1jax.decoding.profiles import PreparedPrompt, ProfileIds, encode_text

NO_TEXT = -1
"""`RowState.text` where nothing is being forced. Its other values are rows of `Tables.text_ids`: these three,
then the wait texts."""
END, BUDGET_END, BUDGET_END_WITH_NEWLINE = 0, 1, 2

_INT32_MAX = int(np.iinfo(np.int32).max)


class Phase(IntEnum):
    """Where a row is."""

    THINKING = 0
    ENDING = 1
    """The end or budget_end text is being forced."""
    ANSWERING = 2
    DONE = 3


class _Reported(IntEnum):
    @property
    def reported(self) -> str | None:
        """The name in results; None while (or where) there is nothing to report."""
        return self.name.lower() if self else None


class ThinkingEnd(_Reported):
    """What ended the thinking; NONE in rows still at it, and in those of a profile that does not think."""

    NONE = 0
    NATURAL = 1
    EOS = 2
    BUDGET = 3
    CONTEXT = 4
    """The budget end was forced to keep room for it and the answer, with the row's own budget not spent."""


class FinishReason(_Reported):
    """What ended the row: an eos, `max_answer_tokens`, or the context length (or `max_total_tokens`)."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    CONTEXT = 3


class Tables(NamedTuple):
    """What all rows of a run share."""

    text_ids: Int[Array, "texts text_length"]
    """The texts that may be forced, padded with 0: the profile's three, then every row's wait texts."""
    text_lengths: Int[Array, " texts"]
    is_end: Bool[Array, " vocab"]
    """Ids that are an end attempt while thinking."""
    is_eos: Bool[Array, " vocab"]
    ends_in_newline: Bool[Array, " vocab"]
    """Ids whose text ends in a newline."""


class RowParams(NamedTuple):
    """Settings of each row, int32."""

    max_thinking_tokens: Int[Any, " batch"]
    """B, or less where the context leaves less room."""
    max_thinking_end: Int[Any, " batch"]
    """The `ThinkingEnd` that reaching it means: BUDGET, or CONTEXT where the room is smaller than B."""
    min_thinking_tokens: Int[Any, " batch"]
    num_ignore: Int[Any, " batch"]
    wait_start: Int[Any, " batch"]
    """Where in the tables the row's wait texts start;"""
    wait_count: Int[Any, " batch"]
    """how many they are (at least 1). The i-th wait is text `wait_start + i % wait_count`."""
    max_answer_tokens: Int[Any, " batch"]
    max_total_tokens: Int[Any, " batch"]
    """Prompt and output together; at most the context length."""


class RowState(NamedTuple):
    """Where each row stands; int32 and bool. A row's next token goes to position `length`."""

    phase: Int[Any, " batch"]
    length: Int[Any, " batch"]
    """Tokens in the context: prompt and output."""
    num_thinking_tokens: Int[Any, " batch"]
    """Sampled or forced, those in the prompt included."""
    num_answer_tokens: Int[Any, " batch"]
    """Sampled ones only."""
    num_waits: Int[Any, " batch"]
    """End attempts that were suppressed with a wait text, be it an empty one."""
    text: Int[Any, " batch"]
    """The text being forced, a row of the tables, or NO_TEXT."""
    offset: Int[Any, " batch"]
    """How many of its tokens are written."""
    mask_end: Bool[Any, " batch"]
    """The next sampled token may not be an end token, because a wait text was just written."""
    ends_in_newline: Bool[Any, " batch"]
    """Whether the last thinking token's text ends in a newline."""
    thinking_end: Int[Any, " batch"]
    finish_reason: Int[Any, " batch"]


def step(
    state: RowState,
    params: RowParams,
    tables: Tables,
    sampled: Int[Array, " batch"],
    sampled_masked: Int[Array, " batch"],
) -> tuple[RowState, Int[Array, " batch"], Bool[Array, " batch"], Bool[Array, " batch"]]:
    """Decide each row's next token: forced, sampled, or none because the row is finished.

    `sampled` is drawn from the row's next-token distribution, `sampled_masked`, independently, from the
    same with the end tokens masked. Drawing both at every step keeps one forward pass and one token per row
    and step: an end attempt that is to be drawn again takes the second draw, and one replaced by a wait or
    an end text gives way to that text's first token, so a sampled delimiter never enters the context.
    Masking beforehand instead, wherever an attempt would be suppressed, is not the same: it would hide the
    attempts that waits count.

    Returns the new state, the token of each row, whether it was forced, and whether there is one: where not,
    the row is finished (an eos is not written) and its token is 0.
    """
    free = _is_free(state)
    spent = free & (state.num_thinking_tokens >= params.max_thinking_tokens)
    attempt = end_attempts(state, tables, sampled) & ~spent
    wait_text = params.wait_start + state.num_waits % params.wait_count
    wait_length = tables.text_lengths[wait_text]
    waits = (
        attempt
        & (state.num_waits < params.num_ignore)
        & (state.num_thinking_tokens + wait_length + 1 <= params.max_thinking_tokens)
    )
    redraws = attempt & ~waits & (state.num_thinking_tokens < params.min_thinking_tokens)
    natural = attempt & ~waits & ~redraws

    budget_text = jnp.where(state.ends_in_newline, BUDGET_END, BUDGET_END_WITH_NEWLINE)
    text = jnp.select(
        [spent, natural, waits & (wait_length > 0)],
        [budget_text, jnp.full_like(state.text, END), wait_text],
        state.text,
    )
    forced = text != NO_TEXT
    row = jnp.maximum(text, 0)
    drawn = jnp.where(state.mask_end | redraws | waits, sampled_masked, sampled)
    token = jnp.where(forced, tables.text_ids[row, state.offset], drawn)

    ending = spent | natural | (state.phase == Phase.ENDING)
    answering = state.phase == Phase.ANSWERING
    stops = answering & tables.is_eos[token]
    written = (state.phase != Phase.DONE) & ~stops
    thinking = (state.phase == Phase.THINKING) & ~ending
    completes = forced & (state.offset + 1 == tables.text_lengths[row])

    length = state.length + written
    num_answer_tokens = state.num_answer_tokens + (answering & written)
    phase = jnp.where(ending, jnp.where(completes, int(Phase.ANSWERING), int(Phase.ENDING)), state.phase)
    finish_reason = jnp.select(
        [
            stops,
            (phase == Phase.ANSWERING) & (num_answer_tokens >= params.max_answer_tokens),
            written & (length >= params.max_total_tokens),
        ],
        [int(FinishReason.STOP), int(FinishReason.LENGTH), int(FinishReason.CONTEXT)],
        state.finish_reason,
    )
    finished = finish_reason != FinishReason.NONE
    goes_on = forced & ~completes & ~finished
    natural_end = jnp.where(tables.is_eos[sampled], int(ThinkingEnd.EOS), int(ThinkingEnd.NATURAL))
    new_state = RowState(
        phase=jnp.where(finished, int(Phase.DONE), phase),
        length=length,
        num_thinking_tokens=state.num_thinking_tokens + thinking,
        num_answer_tokens=num_answer_tokens,
        num_waits=state.num_waits + waits,
        text=jnp.where(goes_on, text, NO_TEXT),
        offset=jnp.where(goes_on, state.offset + 1, 0),
        mask_end=jnp.where(thinking, completes, state.mask_end),
        ends_in_newline=jnp.where(thinking, tables.ends_in_newline[token], state.ends_in_newline),
        thinking_end=jnp.select([spent, natural], [params.max_thinking_end, natural_end], state.thinking_end),
        finish_reason=finish_reason,
    )
    return new_state, jnp.where(written, token, 0), forced, written


def _is_free(state: RowState) -> Bool[Array, " batch"]:
    return (state.phase == Phase.THINKING) & (state.text == NO_TEXT)


def end_attempts(state: RowState, tables: Tables, sampled: Int[Array, " batch"]) -> Bool[Array, " batch"]:
    """Which rows draw an end of their thinking; `step` minds it unless the budget is spent."""
    return _is_free(state) & ~state.mask_end & tables.is_end[sampled]


@dataclass(frozen=True)
class ThinkingBudget:
    """How long one row may think and answer. Raises ValueError, with every problem, for unfit values."""

    max_thinking_tokens: int | Literal["auto"] | None = None
    """Thinking ends after so many tokens; "auto": as many as fit before `budget_end` and the answer."""
    min_thinking_tokens: int = 0
    """An end attempt before so many is drawn again without the end tokens."""
    num_ignore: int = 0
    """So many end attempts are replaced by a wait text."""
    wait: str | tuple[str, ...] = "Wait"
    """The wait text; of several, each attempt takes the next."""
    max_answer_tokens: int | None = None
    max_total_tokens: int | None = None
    """Prompt and output together, where that is to be less than the context length."""

    def __post_init__(self) -> None:
        problems = []
        for key, allowed, lowest in (
            ("max_thinking_tokens", (None, "auto"), 0),
            ("min_thinking_tokens", (), 0),
            ("num_ignore", (), 0),
            ("max_answer_tokens", (None,), 0),
            ("max_total_tokens", (None,), 1),
        ):
            value = getattr(self, key)
            if value in allowed or (type(value) is int and value >= lowest):
                continue
            expected = " or ".join([f"a whole number of at least {lowest}", *map(str, allowed)])
            problems.append(f"{key}: expected {expected}, found {value!r:.60}")
        texts = self.waits
        if not (isinstance(texts, tuple) and texts and all(isinstance(text, str) for text in texts)):
            problems.append(f"wait: expected a text, or a tuple of at least one, found {self.wait!r:.60}")
        if self.max_thinking_tokens == "auto" and self.max_answer_tokens is None:
            problems.append("max_thinking_tokens: auto needs max_answer_tokens, to know what to leave for the answer")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def waits(self) -> tuple[str, ...]:
        """The wait texts, in turn."""
        return (self.wait,) if isinstance(self.wait, str) else self.wait


def build_tables(
    ids: ProfileIds, budgets: Sequence[ThinkingBudget], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tables, dict[tuple[str, ...], int]]:
    """Return the tables of a run whose rows have these budgets, and where each list of wait texts starts.

    To be called once for all rows of a run: the compiled loop depends on the shapes. Raises ValueError,
    with every problem, for a wait text that the tokenizer does not know or that holds an end token (which
    would end the thinking in the text without ending it in the count).
    """
    problems = []
    texts = [ids.end, ids.budget_end, ids.budget_end_with_newline]
    wait_starts: dict[tuple[str, ...], int] = {}
    for waits in dict.fromkeys(budget.waits for budget in budgets):
        wait_starts[waits] = len(texts)
        for wait in waits:
            try:
                encoded = encode_text(wait, tokenizer)
            except ValueError as error:
                problems.append(f"wait: {error}")
                continue
            if set(encoded) & set(ids.end_tokens):
                problems.append(f"wait: {wait!r} holds an end token of the profile {ids.profile.name!r}")
            texts.append(encoded)
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))

    text_ids = np.zeros((len(texts), max(1, *map(len, texts))), np.int32)
    for row, text in zip(text_ids, texts, strict=True):
        row[: len(text)] = text
    vocabulary = np.arange(len(ids.valid))
    tables = Tables(
        text_ids=jnp.asarray(text_ids),
        text_lengths=jnp.array([len(text) for text in texts], jnp.int32),
        is_end=jnp.asarray(np.isin(vocabulary, ids.end_tokens)),
        is_eos=jnp.asarray(np.isin(vocabulary, ids.eos)),
        ends_in_newline=jnp.asarray(ids.ends_in_newline),
    )
    return tables, wait_starts


def resolve_max_thinking_tokens(
    budget: ThinkingBudget, prompt: PreparedPrompt, ids: ProfileIds, context_length: int
) -> tuple[int, ThinkingEnd]:
    """Return the row's bound on thinking tokens, and what reaching it is to be reported as.

    Kept back while thinking is room for `budget_end`, be it with a newline, and for `max_answer_tokens`
    (for one token where that is None). So the bound is the smaller of `max_thinking_tokens` and of what is
    left of the context length (or `max_total_tokens`) after prompt, `budget_end` and answer; thinking
    tokens that the prompt holds already come on top of that. "auto" is what is left. Nothing here depends
    on other rows. Raises ValueError when prompt, `budget_end` and answer do not fit even without thinking.
    """
    limit = min(context_length, budget.max_total_tokens or context_length)
    answer = budget.max_answer_tokens
    if answer is None or not ids.profile.thinks:
        answer = 1
    ending = max(len(ids.budget_end), len(ids.budget_end_with_newline))
    room = limit - len(prompt.prompt_ids) - ending - answer
    if room < 0:
        raise ValueError(
            f"no room to answer: the prompt has {len(prompt.prompt_ids)} tokens, the end of thinking "
            f"{ending} and the answer {answer}, but context_length={context_length} and "
            f"max_total_tokens={budget.max_total_tokens} allow {limit} in all"
        )
    room += prompt.num_thinking_tokens
    if budget.max_thinking_tokens == "auto":
        return room, ThinkingEnd.BUDGET
    if budget.max_thinking_tokens is None or budget.max_thinking_tokens > room:
        return room, ThinkingEnd.CONTEXT
    return budget.max_thinking_tokens, ThinkingEnd.BUDGET


def start_rows(
    budgets: Sequence[ThinkingBudget],
    prompts: Sequence[PreparedPrompt],
    ids: ProfileIds,
    wait_starts: Mapping[tuple[str, ...], int],
    context_length: int,
    batch_size: int,
) -> tuple[RowParams, RowState]:
    """Return settings and first state of a batch, as numpy arrays; rows past the last prompt are finished.

    Raises ValueError that names every row without room for an answer.
    """
    params = RowParams(*(np.zeros(batch_size, np.int32) for _ in RowParams._fields))
    params.wait_count[:] = 1
    state = RowState(
        **{
            field: np.zeros(batch_size, bool if field in ("mask_end", "ends_in_newline") else np.int32)
            for field in RowState._fields
        }
    )
    state.phase[:] = Phase.DONE
    state.text[:] = NO_TEXT
    problems = []
    for i, (budget, prompt) in enumerate(zip(budgets, prompts, strict=True)):
        try:
            max_thinking_tokens, end = resolve_max_thinking_tokens(budget, prompt, ids, context_length)
        except ValueError as error:
            problems.append(f"row {i}: {error}")
            continue
        row = RowParams(
            max_thinking_tokens=max_thinking_tokens,
            max_thinking_end=end,
            min_thinking_tokens=budget.min_thinking_tokens,
            num_ignore=budget.num_ignore,
            wait_start=wait_starts[budget.waits],
            wait_count=len(budget.waits),
            max_answer_tokens=_INT32_MAX if budget.max_answer_tokens is None else budget.max_answer_tokens,
            max_total_tokens=min(context_length, budget.max_total_tokens or context_length),
        )
        for array, value in zip(params, row, strict=True):
            array[i] = min(value, _INT32_MAX)
        state.phase[i] = Phase.THINKING if ids.profile.thinks else Phase.ANSWERING
        state.length[i] = len(prompt.prompt_ids)
        state.num_thinking_tokens[i] = prompt.num_thinking_tokens
        state.ends_in_newline[i] = prompt.ends_in_newline
        if not ids.profile.thinks and budget.max_answer_tokens == 0:
            state.phase[i], state.finish_reason[i] = Phase.DONE, FinishReason.LENGTH
    if problems:
        raise ValueError("\n".join(problems))
    return params, state
