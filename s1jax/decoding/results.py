"""What is reported of a request: new tokens, and its result from a row's ids and where its automaton stands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from s1jax.decoding.budget import FinishReason, RowState, ThinkingEnd
from s1jax.decoding.profiles import PreparedPrompt, ProfileIds
from s1jax.decoding.requests import Request
from s1jax.tokenizer import decode


@dataclass(frozen=True)
class Generation:
    """The result of one request; the names are those of the output file."""

    prompt_ids: list[int]
    """What the model was given, start delimiter included."""
    output_ids: list[int]
    """All that follows, without the eos that ended the answer."""
    forced: list[bool]
    """Of each output id, whether the budget wrote it instead of the model."""
    text: str
    """The output ids decoded at once."""
    thinking: str
    answer: str
    """What follows the end of thinking, a forced "Final Answer:" included."""
    num_thinking_tokens: int
    num_answer_tokens: int
    num_forced_tokens: int
    num_waits: int
    thinking_end: str | None
    """natural, eos, budget or context; None for a profile without thinking, or a row cut short while thinking."""
    finish_reason: str | None
    """stop, length or context."""
    logprobs: list[float] | None
    """Of each output id under the model's own distribution, forced ones too; None unless asked for."""


@dataclass(frozen=True)
class Progress:
    """New tokens of a request that is not finished."""

    request: Request
    output_ids: list[int]
    forced: list[bool]
    logprobs: list[float]
    """Of the ids; zeros unless the engine was asked for them."""
    num_thinking_tokens: int
    """Of all its output so far, these first ones are thinking."""
    num_waits: int
    """So far."""
    thinking_end: str | None
    """What ended the thinking, as in `Generation`; None while it goes on."""


@dataclass(frozen=True)
class Finished:
    """A request's result."""

    request: Request
    generation: Generation
    num_decoded_tokens: int
    """Output tokens that were decoded for it; the others it shares with a request that was decoded before."""


def generation_of(
    prompt: PreparedPrompt,
    output_ids: list[int],
    forced: list[bool],
    logprobs: list[float] | None,
    state: RowState,
    profile: ProfileIds,
    tokenizer: PreTrainedTokenizerBase,
) -> Generation:
    """The result of a row: of its prompt, what followed, and its last state, a number in each field."""
    before = prompt.num_thinking_tokens
    thought = int(state.num_thinking_tokens) - before
    thinking_ids = [*prompt.prompt_ids[len(prompt.prompt_ids) - before :], *output_ids[:thought]]
    if profile.profile.thinks:
        answer = _answer(output_ids[thought:], forced[thought:], profile, tokenizer)
    else:
        answer = decode(output_ids, tokenizer)
    return Generation(
        prompt_ids=list(prompt.prompt_ids),
        output_ids=output_ids,
        forced=forced,
        text=decode(output_ids, tokenizer),
        thinking=decode(thinking_ids, tokenizer),
        answer=answer,
        num_thinking_tokens=int(state.num_thinking_tokens),
        num_answer_tokens=int(state.num_answer_tokens),
        num_forced_tokens=sum(forced),
        num_waits=int(state.num_waits),
        thinking_end=ThinkingEnd(int(state.thinking_end)).reported,
        finish_reason=FinishReason(int(state.finish_reason)).reported,
        logprobs=logprobs,
    )


def under(result: Generation, reached: ThinkingEnd) -> Generation:
    """The same tokens as reported of a request for which to reach its bound on thinking means this."""
    if result.thinking_end not in (ThinkingEnd.BUDGET.reported, ThinkingEnd.CONTEXT.reported):
        return result
    return replace(result, thinking_end=reached.reported)


def _answer(ids: Sequence[int], forced: Sequence[bool], profile: ProfileIds, tokenizer: PreTrainedTokenizerBase) -> str:
    """The answer's text, from what follows the thinking: a forced delimiter, then sampled tokens."""
    sampled = next((i for i, flag in enumerate(forced) if not flag), len(forced))
    delimiter = profile.profile.end
    if delimiter in decode(ids[:sampled], tokenizer):
        return decode(ids, tokenizer).partition(delimiter)[2]
    return decode(ids[sampled:], tokenizer)
