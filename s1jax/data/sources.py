"""Reads rows from a JSON Lines, JSON or Parquet file, or from a data set of the Hugging Face hub.

A row keeps the number it is known by outside (a line of a JSON Lines file, else a row, both from 1), so that
whatever is wrong with it can be said with its place.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pyarrow import ArrowInvalid, parquet

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LISTED_PROBLEMS = 20


class DataError(ValueError):
    """The training data cannot be used; the message says where, what was found and what was expected."""


class Problem(NamedTuple):
    """What is wrong with the row of that number."""

    number: int
    text: str


def describe(value: object) -> str:
    """A value that was found where another was expected, in a few words."""
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"


@dataclass(frozen=True)
class Source:
    """All rows of one source: the readable ones, and what is wrong with the others."""

    path: str
    unit: Literal["line", "row"]
    rows: list[tuple[int, dict[str, Any]]]
    problems: list[Problem]

    def error(self, problems: list[Problem]) -> DataError:
        """One error for all of these problems, in the order of the rows; the first 20 of them in words."""
        in_order = sorted(problems, key=lambda problem: problem.number)
        listed = [f"  {self.unit} {number}: {text}" for number, text in in_order[:LISTED_PROBLEMS]]
        if len(problems) > len(listed):
            listed.append(f"  ... and {len(problems) - len(listed)} more")
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        return DataError("\n".join([f"{self.path}: {count} ({self.unit}s count from 1)", *listed]))


def read_source(path: str) -> Source:
    """Read all rows of a .jsonl, .json (a list of objects) or .parquet file, a directory, or a hub data set.

    A directory and a hub id ("owner/name", where no such file exists) go through `datasets.load_dataset`
    and give their `train` split. Lines of white space alone are no rows.

    Raises:
        DataError: if there is no such file, it is of another kind, unreadable as a whole, or has no rows.
            A single bad row is no error here but a `Problem` in the result.
    """
    file = Path(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if file.is_file():
        if file.suffix not in readers:
            raise DataError(f"{path}: cannot read a '{file.suffix}' file, expected one of {', '.join(readers)}")
        source = readers[file.suffix](file)
    elif file.is_dir() or (HUB_ID.fullmatch(path) and file.suffix not in readers):
        source = _read_with_datasets(path)
    else:
        raise DataError(f"{path}: no such file, and not the id of a hub data set (owner/name)")
    if not source.rows and not source.problems:
        raise DataError(f"{path}: there are no rows in it")
    return source


def _objects(path: str, unit: Literal["line", "row"], values: list[tuple[int, Any]]) -> Source:
    rows = [(number, value) for number, value in values if isinstance(value, dict)]
    problems = [
        Problem(number, f"expected an object with named fields, found {describe(value)}")
        for number, value in values
        if not isinstance(value, dict)
    ]
    return Source(path, unit, rows, problems)


def _read_jsonl(file: Path) -> Source:
    values, problems = [], []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((number, json.loads(line.decode("utf-8-sig"))))
        except UnicodeDecodeError as error:
            problems.append(Problem(number, f"not UTF-8: {error.reason} at byte {error.start + 1}"))
        except json.JSONDecodeError as error:
            problems.append(Problem(number, f"not JSON: {error.msg} at character {error.pos + 1}"))
    source = _objects(str(file), "line", values)
    source.problems.extend(problems)
    return source


def _read_json(file: Path) -> Source:
    hint = "expected a list of objects (one object per line belongs in a .jsonl file)"
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}; {hint}") from error
    if not isinstance(values, list):
        raise DataError(f"{file}: {hint}, found {describe(values)}")
    return _objects(str(file), "row", list(enumerate(values, start=1)))


def _read_parquet(file: Path) -> Source:
    try:
        values = parquet.read_table(file).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: not readable as Parquet: {error}") from error
    return _objects(str(file), "row", list(enumerate(values, start=1)))


def _read_with_datasets(path: str) -> Source:
    # Imported here: it takes a second, and most runs read a file.
    import datasets

    try:
        values = datasets.load_dataset(path, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error
        raise DataError(
            f"{path}: no file of that name, and `datasets` cannot load it with a train split: {reason}"
        ) from error
    return _objects(path, "row", list(enumerate(values, start=1)))
