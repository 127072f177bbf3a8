"""Reading JSON that means one thing: no key twice, no NaN, nothing nested without end, no half characters."""

import json
import re
from typing import Any, NoReturn

_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""How a lone surrogate is spelled in JSON, and each half of a pair, too. UTF-8 itself has none."""


def parse_json(content: bytes, *, allow_nan: bool = False) -> Any:
    """The value of a whole JSON file, or line, in UTF-8.

    Raises ValueError that says in one line what is wrong: also for what Python's own reader takes (a key that stands
    twice in an object, half of a surrogate pair, which no file can hold, and unless `allow_nan` NaN and Infinity) and
    for what it fails at otherwise (nesting deeper than it can follow).
    """
    refuse = None if allow_nan else _refuse_constant
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_constant=refuse)
        if _MAYBE_SURROGATE.search(content):
            _check_texts(value, "")
        return value
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in content.rstrip() else ""
        raise ValueError(f"not JSON: {error.msg} at {line}character {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: it is nested too deeply") from None


def check_unicode(text: str) -> None:
    """Raise ValueError for a text with half of a surrogate pair, which no file and no tokenizer can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise ValueError(f"not valid Unicode: a lone surrogate, {half}, at character {error.start + 1}") from None


def _check_texts(value: Any, name: str) -> None:
    """Check every text of a value, which is not nested more deeply than it could be read."""
    try:
        if isinstance(value, str):
            check_unicode(value)
    except ValueError as error:
        raise ValueError(f"{name:.100}: {error}" if name else str(error)) from None
    if isinstance(value, list):
        for index, part in enumerate(value):
            _check_texts(part, f"{name}[{index}]")
    if isinstance(value, dict):
        for key, part in value.items():
            _check_texts(key, f"{name}: a key")
            _check_texts(part, f"{name}.{key}" if name else key)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"not usable JSON: the key {name!r:.60} stands twice in one object")
            seen.add(name)
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is not a number there")
