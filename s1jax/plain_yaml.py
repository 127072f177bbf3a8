"""YAML as configurations need it: texts, numbers, true and false, null, lists and mappings, in bounded time and memory.

Of YAML 1.1 this leaves out what turns a text into something that nobody meant: dates, numbers in base 8 and 60, tags.
"""

import copy
import re
from collections.abc import Hashable
from typing import Any

import yaml

from s1jax.paths import AnyPath, read_start

_MOST_BYTES = 2**18
_MOST_VALUES = 5_000
"""Of a whole text, those that an alias repeats counted again."""
_MOST_LEVELS = 50

_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **{f(word): True for word in ("true", "yes", "on") for f in (str.lower, str.upper, str.capitalize)},
    **{f(word): False for word in ("false", "no", "off") for f in (str.lower, str.upper, str.capitalize)},
    ".nan": float("nan"),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]{0,40})")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.inf)")
_MERGE = "<<"
_STR_TAG = "tag:yaml.org,2002:str"


def read_yaml(path: AnyPath) -> Any:
    """The value of a YAML file in UTF-8.

    Raises OSError, or ValueError that says in one line what is wrong, without the file's name.
    """
    # No further, whatever its size: /dev/zero has none, and no end.
    content = read_start(path, _MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"larger than {_MOST_BYTES} bytes, which no configuration is")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    return parse_yaml(text)


def parse_yaml(text: str, *, only_texts: bool = False) -> Any:
    """The value of a YAML text; with `only_texts`, 42 and yes are texts too.

    Raises ValueError that says in one line what is wrong.
    """
    try:
        return _Builder(text, only_texts).build()
    except yaml.MarkedYAMLError as error:
        raise _error(error.problem or error.context, error.problem_mark or error.context_mark) from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"not valid YAML: character {error.position + 1} is #x{error.character:04x}") from None


class _Builder:
    """Makes values from the parser's events, which come one by one: what is too much ends it at once."""

    def __init__(self, text: str, only_texts: bool):
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._only_texts = only_texts
        self._anchors: dict[str, tuple[Any, int]] = {}
        """Each finished value that has a name, and how many values it holds."""
        self._values = 0

    def build(self) -> Any:
        next(self._events)  # The start of the stream.
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), 0)
        next(self._events)  # The end of the document.
        if not isinstance(event := next(self._events), yaml.StreamEndEvent):
            raise _error("a second document begins", event.start_mark)
        return value

    def _value(self, event: yaml.Event, level: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _error(f"*{event.anchor} stands for nothing that was whole before it", event.start_mark)
            value, size = self._anchors[event.anchor]
            self._count(size, event)
            # A copy: what is set in one of its places stays there.
            return copy.deepcopy(value)
        before = self._values
        self._count(1, event)
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        else:
            assert isinstance(event, yaml.CollectionStartEvent)
            if level == _MOST_LEVELS:
                raise _error(f"nested deeper than {_MOST_LEVELS} levels", event.start_mark)
            if event.tag is not None:
                raise _error(f"the tag {event.tag} is not supported", event.start_mark)
            value = self._sequence(level) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(level)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._values - before)
        return value

    def _count(self, values: int, event: yaml.Event) -> None:
        self._values += values
        if self._values > _MOST_VALUES:
            raise _error(f"more than {_MOST_VALUES} values, those that aliases repeat counted again", event.start_mark)

    def _sequence(self, level: int) -> list[Any]:
        values = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, level + 1))
        return values

    def _mapping(self, level: int) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._value(event, level + 1)
            if not isinstance(key, Hashable):
                raise _error("a key is a list or a mapping", event.start_mark)
            if key in values:
                raise _error(f"the key {key!r:.60} stands twice", event.start_mark)
            values[key] = self._value(next(self._events), level + 1)
            if key == _MERGE and not isinstance(values[key], dict):
                raise _error(f"{_MERGE} takes one mapping", event.start_mark)
        # What stands in the mapping itself wins.
        return {**values.pop(_MERGE, {}), **values}

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text = event.value
        if event.tag not in (None, "!", _STR_TAG):
            raise _error(f"the tag {event.tag} is not supported", event.start_mark)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _error("a text is not valid Unicode: it has a surrogate", event.start_mark)
        # Quoted, or said to be a text.
        if event.style is not None or event.tag is not None or self._only_texts:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            return int(text.replace("_", ""))
        if _FLOAT.fullmatch(text):
            return float(text.replace("_", "").replace(".inf", "inf"))
        return text


def _error(problem: str | None, mark: Any) -> ValueError:
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return ValueError(f"not valid YAML: {problem}{place}")
