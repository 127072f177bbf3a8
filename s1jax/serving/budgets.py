"""Thinking budgets under every name that clients of other servers give them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from s1jax.config import Limit

_MAXIMA = ("max_thinking_tokens", "thinking_token_budget", "thinking_budget", "thinking_budget_tokens")
"""Of this project; of vLLM and Dynamo; of Qwen; of llama.cpp."""
_COUNTS = ("min_thinking_tokens", "num_ignore", "max_answer_tokens")
_NESTED = ("extra_body", "chat_template_kwargs")
"""Objects of a request in which clients put what is no field of OpenAI's."""
_OTHERS = ("wait", "reasoning", "thinking", "reasoning_effort", "enable_thinking", "include_reasoning")
BUDGET_FIELDS = _MAXIMA + _COUNTS + _OTHERS + _NESTED
_LOOKS_LIKE_ONE = ("think", "reason", "budget", "effort", "ignore", "wait")


class FieldError(ValueError):
    """A request that cannot be answered as it asks; `field` is what of it."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.field = field


@dataclass(frozen=True)
class AskedBudget:
    """What a request says of its thinking; None is what it leaves to the server."""

    max_thinking_tokens: Limit | None = None
    min_thinking_tokens: int | None = None
    num_ignore: int | None = None
    wait: str | tuple[str, ...] | None = None
    max_answer_tokens: int | None = None
    exclude: bool | None = None
    """Whether the thinking is left out of the answer."""


def asked_budget(body: Mapping[str, Any], efforts: Mapping[str, Limit]) -> AskedBudget:
    """Read `BUDGET_FIELDS` of a request at its top level, and any in `extra_body` and `chat_template_kwargs`.

    `efforts` are the tokens of each word of `reasoning_effort`. Raises FieldError for a value that is none, two that
    contradict each other, and, in these two objects, every field that is not known here.
    """
    found: dict[str, tuple[str, Any]] = {}
    for place, key, value in _settings(body, efforts):
        before = found.setdefault(key, (place, value))
        if before[1] != value:
            raise FieldError(place, f"contradicts {before[0]}: {key}={value!r:.60} and {key}={before[1]!r:.60}")
    asked = AskedBudget(**{key: value for key, (_, value) in found.items()})
    if isinstance(asked.max_thinking_tokens, int) and (asked.min_thinking_tokens or 0) > asked.max_thinking_tokens:
        names = [found[key][0] for key in ("min_thinking_tokens", "max_thinking_tokens")]
        raise FieldError(
            names[0], f"{asked.min_thinking_tokens} is more than the {asked.max_thinking_tokens} of {names[1]}"
        )
    return asked


def unknown_field(name: str) -> FieldError:
    """What to raise of a field that is not known."""
    if any(part in name.lower() for part in _LOOKS_LIKE_ONE):
        known = ", ".join(_MAXIMA + _COUNTS + _OTHERS)
        return FieldError(name, f"looks like a thinking budget, and is none of those that are known: {known}")
    return FieldError(name, "is not a field that this server knows")


def _settings(body: Mapping[str, Any], efforts: Mapping[str, Limit]) -> Iterator[tuple[str, str, Any]]:
    """Everything said, as (where it is said, field of `AskedBudget`, value)."""
    places = [("", body)]
    extra = _object(body, "", "extra_body") or {}
    places.append(("extra_body.", extra))
    for prefix, outer in (("", body), ("extra_body.", extra)):
        if inner := _object(outer, prefix, "chat_template_kwargs"):
            places.append((f"{prefix}chat_template_kwargs.", inner))
    for prefix, fields_here in places:
        if prefix:
            for key, value in fields_here.items():
                if key not in BUDGET_FIELDS and value is not None:
                    raise unknown_field(prefix + key)
        yield from _settings_at(prefix, fields_here, efforts)


def _settings_at(prefix: str, body: Mapping[str, Any], efforts: Mapping[str, Limit]) -> Iterator[tuple[str, str, Any]]:
    for name in (*_MAXIMA, *_COUNTS):
        if (value := body.get(name)) is not None:
            # The word is this project's; -1 is how llama.cpp says "no bound".
            if name in _MAXIMA and (value == "auto" or (name == "thinking_budget_tokens" and value == -1)):
                yield prefix + name, "max_thinking_tokens", "auto"
                continue
            yield prefix + name, name if name in _COUNTS else "max_thinking_tokens", _count(prefix + name, value)
    if (wait := body.get("wait")) is not None:
        texts = (wait,) if isinstance(wait, str) else wait
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
            raise FieldError(prefix + "wait", f"expected a text or a list of texts, found {wait!r:.60}")
        yield prefix + "wait", "wait", tuple(texts)
    if (effort := body.get("reasoning_effort")) is not None:
        yield prefix + "reasoning_effort", "max_thinking_tokens", _effort(prefix + "reasoning_effort", effort, efforts)
    if (enable := body.get("enable_thinking")) is not None and not _flag(prefix + "enable_thinking", enable):
        yield prefix + "enable_thinking", "max_thinking_tokens", 0
    if (include := body.get("include_reasoning")) is not None:
        yield prefix + "include_reasoning", "exclude", not _flag(prefix + "include_reasoning", include)
    if (reasoning := _object(body, prefix, "reasoning")) is not None:
        yield from _reasoning(prefix + "reasoning", reasoning, efforts)
    if (thinking := _object(body, prefix, "thinking")) is not None:
        yield from _thinking(prefix + "thinking", thinking)


def _reasoning(
    place: str, reasoning: Mapping[str, Any], efforts: Mapping[str, Limit]
) -> Iterator[tuple[str, str, Any]]:
    """OpenRouter's object."""
    for name, value in reasoning.items():
        at = f"{place}.{name}"
        match name:
            case _ if value is None:
                continue
            case "max_tokens":
                yield at, "max_thinking_tokens", _count(at, value)
            case "effort":
                yield at, "max_thinking_tokens", _effort(at, value, efforts)
            case "exclude":
                yield at, "exclude", _flag(at, value)
            case "enabled":
                if not _flag(at, value):
                    yield at, "max_thinking_tokens", 0
            case _:
                raise FieldError(at, "is not known; known are max_tokens, effort, exclude, enabled")


def _thinking(place: str, thinking: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Anthropic's object."""
    if unknown := [
        name for name, value in thinking.items() if name not in ("type", "budget_tokens") and value is not None
    ]:
        raise FieldError(f"{place}.{unknown[0]}", "is not known; known are type, budget_tokens")
    kind, tokens = thinking.get("type"), thinking.get("budget_tokens")
    if kind not in ("enabled", "disabled"):
        raise FieldError(f"{place}.type", f"expected enabled or disabled, found {kind!r:.60}")
    if kind == "disabled":
        yield f"{place}.type", "max_thinking_tokens", 0
    if tokens is not None:
        yield f"{place}.budget_tokens", "max_thinking_tokens", _count(f"{place}.budget_tokens", tokens)


def _object(body: Mapping[str, Any], prefix: str, name: str) -> Mapping[str, Any] | None:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise FieldError(prefix + name, f"expected an object, found {value!r:.60}")
    return value


def _count(place: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise FieldError(place, f"expected a whole number of at least 0, found {value!r:.60}")
    return value


def _flag(place: str, value: Any) -> bool:
    if type(value) is not bool:
        raise FieldError(place, f"expected true or false, found {value!r:.60}")
    return value


def _effort(place: str, value: Any, efforts: Mapping[str, Limit]) -> Limit:
    if not isinstance(value, str) or value not in efforts:
        raise FieldError(place, f"expected one of {', '.join(efforts)}, found {value!r:.60}")
    return efforts[value]
