"""Reading a Hugging Face config.json: the file, and its values with the type that each must have."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from s1jax.paths import AnyPath
from s1jax.strict_json import parse_json

_MOST = 2**31 - 1
"""Sizes and token ids are 32-bit integers on devices."""
_LARGEST_NUMBER = float(np.finfo(np.float32).max)
_MISSING = object()


class UnsupportedConfigError(ValueError):
    """A config.json that describes a model which this project would not compute exactly."""

    def __init__(self, file: str, problems: list[str]):
        listed = f" {problems[0]}" if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"{file}:{listed}")


def read_config_json(directory: AnyPath) -> dict[str, Any]:
    """Parse `directory`/config.json.

    Raises FileNotFoundError or UnsupportedConfigError naming the file.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model directory holds a config.json")
    return _read_object(path)


def read_eos_ids(directory: AnyPath) -> tuple[int, ...]:
    """The ids that end a text by `directory`/generation_config.json; none if there is no such file or key.

    Raises UnsupportedConfigError naming the file.
    """
    path = directory / "generation_config.json"
    found = _read_object(path).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(i) is not int or not 0 <= i <= _MOST for i in ids):
        raise UnsupportedConfigError(str(path), [f"eos_token_id: expected ids, found {found!r:.60}"])
    return tuple(ids)


def _read_object(path: AnyPath) -> dict[str, Any]:
    try:
        hf = parse_json(path.read_bytes())
    except ValueError as error:
        raise UnsupportedConfigError(str(path), [str(error)]) from None
    if not isinstance(hf, dict):
        raise UnsupportedConfigError(str(path), [f"expected a JSON object, found {shown(hf)}"])
    return hf


def shown(value: object) -> str:
    """A value that was found, in a few words."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return f"{value!r:.60}"


class Fields:
    """The values of one JSON object by type; what is wrong with them is added to `problems` by name.

    A method that finds a problem returns a value of the right type all the same, so that reading goes on.
    """

    def __init__(self, values: Mapping[str, Any], problems: list[str], prefix: str = ""):
        """`prefix` stands before the names in problems."""
        self._values, self._problems, self._prefix = values, problems, prefix

    def integer(self, key: str, default: Any = _MISSING, *, most: int = _MOST) -> int:
        """A whole number from 1 to `most`; required without a default."""
        value = self._values.get(key, default)
        if type(value) is int and 0 < value <= most:
            return value
        too_much = type(value) is int and value > most
        self._expected(key, value, "a positive integer" + (f" up to {most}" if too_much else ""))
        return 1

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A number above 0 that is one in float32 too; required without a default."""
        value = self._values.get(key, default)
        if type(value) in (int, float) and 0 < value <= _LARGEST_NUMBER and np.float32(value) > 0:
            return float(value)
        self._expected(key, value, "a positive number")
        return 2.0

    def boolean(self, key: str, default: bool) -> bool:
        """true or false, and nothing that merely looks like one of them."""
        value = self._values.get(key, default)
        if isinstance(value, bool):
            return value
        self._expected(key, value, "true or false")
        return default

    def _expected(self, key: str, value: Any, expected: str) -> None:
        found = "is missing" if value is _MISSING else f"is {shown(value)}"
        self._problems.append(f"{self._prefix}{key} {found}, expected {expected}")
