"""The files of a run directory that may be too large to hold in memory, and those that are replaced whole."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from s1jax.jsonl import InputError, Problem, describe, read_jsonl


def read_questions(output_dir: Path) -> list[dict[str, Any]]:
    """The rows of questions.jsonl, each with a text `id` of its own and a text `question`.

    Raises InputError if the file is not there, or with every line that cannot be used.
    """
    source = read_jsonl(stage_output(output_dir, "questions.jsonl", "collect"))
    problems, seen = list(source.problems), set()
    for line, row in source.rows:
        for key in ("id", "question"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                problems.append(Problem(line, f"{key}: expected a text, found {describe(row.get(key))}"))
        if str(row.get("id")) in seen:
            problems.append(Problem(line, f"id {row['id']!r} is that of an earlier line too"))
        seen.add(str(row.get("id")))
    if problems:
        raise source.error(problems)
    return [row for _, row in source.rows]


def stream_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that one of the stages wrote, one at a time.

    A last line cut short by the end of a run is removed from the file. Raises InputError at a line that is no object.
    """
    with path.open("rb") as file:
        start = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                os.truncate(path, start)
                return
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number}: it was not written by this command: move the file away")
            yield row
            start += len(line)


def stage_output(output_dir: Path, name: str, stage: str) -> Path:
    """The path of a file that a stage writes. Raises InputError that names the stage if it is not there."""
    path = output_dir / name
    if not path.exists():
        raise InputError(f"{path}: not there; run the stage {stage} first")
    return path


def write_whole(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file by these rows, or leave it as it was. Raises InputError where they cannot be written."""
    with _replacing(path) as file:
        file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by this content, or leave it as it was. Raises InputError where it cannot be written."""
    with _replacing(path) as file:
        file.write(content)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of the one at `path` once it is whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: {error.strerror}") from None
