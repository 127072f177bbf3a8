"""Reading JSON that means one thing: no key twice, no NaN, nothing nested without end."""

import json
from typing import Any, NoReturn


def parse_json(content: bytes) -> Any:
    """The value of a whole JSON file in UTF-8.

    Raises ValueError that says in one line what is wrong: also for what Python's own reader takes (a key that stands
    twice in an object, NaN and Infinity) and for what it fails at otherwise (nesting deeper than it can follow).
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not usable JSON: it is nested too deeply") from None


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
