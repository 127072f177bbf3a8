"""Prompts as a person writes them, made into requests: checked as a whole before anything is computed."""

from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from s1jax.chat_template import render_chat
from s1jax.config import BudgetSection
from s1jax.decoding.budget import ThinkingBudget, build_tables, resolve_max_thinking_tokens
from s1jax.decoding.profiles import PreparedPrompt, ProfileIds
from s1jax.decoding.sampling import GREEDY, Sampling
from s1jax.jsonl import Problem, read_jsonl
from s1jax.paths import AnyPath
from s1jax.tokenizer import encode, encode_all

Messages = list[dict[str, str]]

ROW_BUDGET_KEYS = ("max_thinking_tokens", "min_thinking_tokens", "num_ignore", "wait", "max_answer_tokens")
_PROMPT_KEYS = ("prompt", "messages", "input_ids")


class EncodedPrompt(NamedTuple):
    """The ids of a prompt, and from which of them on it is not what a user has said."""

    input_ids: list[int]
    after_user: int = 0
    """An opening of the thinking counts from here on: what the chat template or an assistant's last turn wrote."""


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file: what to show again in the output, its ids, and its budget."""

    id: Any
    given: str | Messages | list[int]
    encoded: EncodedPrompt
    budget: ThinkingBudget


@dataclass(frozen=True)
class Request:
    """One sample to generate: a prompt with its start delimiter, its budget, and what its randomness comes from."""

    prompt: PreparedPrompt
    budget: ThinkingBudget
    index: int
    """Of the prompt in its run, from 0; with `sample` and `seed` it determines every draw."""
    sample: int = 0
    sampling: Sampling = GREEDY
    seed: int = 0


def problem_of(request: Request, profile: ProfileIds, context: int, cache_tokens: int | None = None) -> str | None:
    """Why a request cannot be run by a model of this context length, in a cache for so many tokens.

    It has no prompt, or no room to answer, or one row is more than the cache has room for.
    """
    if not request.prompt.prompt_ids:
        return "the prompt is empty"
    try:
        longest = longest_context(request, profile, context)
    except ValueError as error:
        return str(error)
    if cache_tokens is not None and longest > cache_tokens:
        return f"may need {longest} tokens, and cache.tokens is {cache_tokens}: lower max_total_tokens or the budget"
    return None


def longest_context(request: Request, profile: ProfileIds, context: int) -> int:
    """The most tokens, prompt included, that a request can come to. Raises ValueError if there is no room to answer."""
    budget, prompt = request.budget, len(request.prompt.prompt_ids)
    thinking, _ = resolve_max_thinking_tokens(budget, request.prompt, profile, context)
    limit = min(context, budget.max_total_tokens or context)
    if budget.max_answer_tokens is None:
        return limit
    if not profile.profile.thinks:
        return min(limit, prompt + budget.max_answer_tokens)
    ending = max(map(len, (profile.end, profile.budget_end, profile.budget_end_with_newline)))
    return min(limit, prompt + thinking + ending + budget.max_answer_tokens)


def encode_prompt(
    given: str | Messages | list[int], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> EncodedPrompt:
    """The ids of a prompt: text (as the user's turn if `chat_template`), messages, or ids as they are.

    Of text without a template and of ids all counts as the model's. Raises TemplateError, and ValueError for a text
    that cannot be tokenised.
    """
    messages: Any = given
    if isinstance(given, str):
        if not chat_template:
            return EncodedPrompt(encode(given, tokenizer))
        messages = [{"role": "user", "content": given}]
    elif not isinstance(given[0], dict):
        return EncodedPrompt([int(i) for i in messages])
    text = render_chat(messages, tokenizer, add_generation_prompt=True)
    encoding = encode_all([text], tokenizer, return_offsets_mapping=True)
    tail = len(text) - _length_after_user(messages, text, tokenizer)
    offsets = encoding["offset_mapping"][0]
    after = next((i for i, (start, _) in enumerate(offsets) if start >= tail), len(offsets))
    return EncodedPrompt(list(encoding["input_ids"][0]), after)


def _length_after_user(messages: Messages, text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The characters at the end of a rendered prompt that follow the last content which is not an assistant's.

    They are those that stay when this content is replaced by a character that it does not end with.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] != "assistant"), default=None)
    if last is None:
        return len(text)
    other = next(mark for mark in "\ue000\ue001" if not messages[last]["content"].rstrip().endswith(mark))
    changed = [*messages[:last], {**messages[last], "content": other}, *messages[last + 1 :]]
    rendered = render_chat(changed, tokenizer, add_generation_prompt=True)
    return sum(takewhile(bool, map(eq, reversed(text), reversed(rendered))))


def thinking_budget(section: BudgetSection, max_total_tokens: int | None) -> ThinkingBudget:
    """The budget that the configuration gives to every row.

    Raises ValueError, with every problem.
    """
    return ThinkingBudget(**{key: getattr(section, key) for key in ROW_BUDGET_KEYS}, max_total_tokens=max_total_tokens)


def read_prompts(
    path: AnyPath,
    tokenizer: PreTrainedTokenizerBase,
    profile: ProfileIds,
    default: ThinkingBudget,
    *,
    chat_template: bool,
) -> list[Prompt]:
    """Read a JSONL file of prompts; a row's own budget keys win over `default`.

    Raises InputError listing every line that cannot be used.
    """
    source = read_jsonl(path)
    problems = list(source.problems)
    prompts: list[Prompt] = []
    lines_by_id: dict[str, int] = {}
    for line, row in source.rows:
        reasons: list[str] = []
        given = _given(row, reasons)
        encoded = EncodedPrompt([])
        if given:
            try:
                encoded = encode_prompt(given, tokenizer, chat_template)
            except ValueError as error:
                reasons.append(str(error))
        outside = [i for i in encoded.input_ids if not 0 <= i < len(profile.valid) or not profile.valid[i]]
        if outside:
            reasons.append(f"ids {outside[:5]} are not the tokenizer's")
        budget = _row_budget(row, default, profile, tokenizer, reasons)
        prompt_id = row.get("id", len(prompts))
        first = lines_by_id.setdefault(repr(prompt_id), line)
        if first != line:
            reasons.append(f"id {prompt_id!r} is that of line {first} too")
        problems += [Problem(line, reason) for reason in reasons]
        if not reasons and budget is not None:
            prompts.append(Prompt(prompt_id, given, encoded, budget))
    if problems:
        raise source.error(problems)
    return prompts


def _given(row: dict[str, Any], reasons: list[str]) -> Any:
    present = [key for key in _PROMPT_KEYS if row.get(key) is not None]
    if len(present) != 1:
        found = f"found {' and '.join(present)}" if present else f"found {sorted(row) or 'an empty object'!s:.300}"
        reasons.append(f"expected one of prompt, messages and input_ids, {found}")
        return None
    kind: Any = {"prompt": str, "messages": Messages, "input_ids": list[int]}[present[0]]
    try:
        given: Any = TypeAdapter(kind).validate_python(row[present[0]], strict=True)
    except ValidationError as error:
        reasons.append(f"{present[0]}: {error.errors()[0]['msg']}")
        return None
    if not given or (isinstance(given, str) and not given.strip()):
        reasons.append(f"{present[0]} is empty")
        return None
    if present[0] == "messages":
        missing = [key for message in given for key in ("role", "content") if key not in message]
        if missing:
            reasons.append(f"messages: a message has no {missing[0]}")
            return None
    return given


def _row_budget(
    row: dict[str, Any],
    default: ThinkingBudget,
    profile: ProfileIds,
    tokenizer: PreTrainedTokenizerBase,
    reasons: list[str],
) -> ThinkingBudget | None:
    own: dict[str, Any] = {
        key: tuple(row[key]) if isinstance(row[key], list) else row[key] for key in ROW_BUDGET_KEYS if key in row
    }
    try:
        budget = replace(default, **own)
        if "wait" in own:
            build_tables(profile, [budget], tokenizer)
    except ValueError as error:
        reasons.append(str(error))
        return None
    return budget
