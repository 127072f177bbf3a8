"""What a chat completion says: the text of its answer, the reasoning before it, and the tokens it took."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from s1jax.curation.endpoint import FailureError

_Count = Annotated[int, Field(ge=0, le=10**9)]
_THOUGHT_TYPES = ("thinking", "thought", "reasoning")


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: _Count
    completion_tokens: _Count


class _Message(BaseModel):
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]


@dataclass(frozen=True)
class Reply:
    """An answer taken apart; both texts are stripped and may be empty."""

    trace: str
    text: str
    cut: bool
    """Whether it was ended by max_tokens."""


def read_reply(response: dict[str, Any]) -> Reply:
    """Take a chat completion apart. Raises FailureError if it is none."""
    try:
        choice = _Completion.model_validate(response).choices[0]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FailureError(f"not a chat completion: {place}: {first['msg']}", "rubbish") from None
    message = choice.message
    content = message.content or ""
    if isinstance(content, list):
        thoughts = "".join(_part_text(part) for part in content if _is_thought(part))
        content = "".join(_part_text(part) for part in content if not _is_thought(part))
    else:
        thoughts = ""
    trace = message.reasoning_content or message.reasoning or thoughts
    if not trace.strip():
        trace, content = _split_tags(content, "think")
    if not trace.strip():
        trace, content = _split_tags(content, "thought")
    return Reply(trace.strip(), content.strip(), choice.finish_reason == "length")


def read_usage(response: dict[str, Any] | None) -> Usage | None:
    """The tokens that a response says it took, if it does."""
    try:
        return Usage.model_validate((response or {}).get("usage"))
    except ValidationError:
        return None


def _is_thought(part: dict[str, Any]) -> bool:
    return part.get("thought") is True or part.get("type") in _THOUGHT_TYPES


def _part_text(part: dict[str, Any]) -> str:
    """The text of a content part; a thinking part may hold a list of text parts."""
    value = next((part[key] for key in ("text", *_THOUGHT_TYPES) if isinstance(part.get(key), str | list)), "")
    if isinstance(value, str):
        return value
    texts = (inner.get("text") for inner in value if isinstance(inner, dict))
    return "".join(text for text in texts if isinstance(text, str))


def _split_tags(text: str, tag: str) -> tuple[str, str]:
    """The text in the tags and the rest. The opening one may be missing, where the chat template writes it."""
    before, closing, rest = text.partition(f"</{tag}>")
    if not closing:
        return "", text
    lead, opening, trace = before.partition(f"<{tag}>")
    return (trace, lead + rest) if opening else (before, rest)
