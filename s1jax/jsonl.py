"""JSON Lines files that a run reads as a whole and writes so that it can be stopped and started again."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

_LISTED = 20


class InputError(ValueError):
    """Rows of an input file that cannot be used; the message names file, line and reason, the first 20 of them."""

    def __init__(self, path: Path | str, problems: list[str]):
        listed = "\n".join(f"  {problem}" for problem in problems[:_LISTED])
        rest = f"\n  ... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        super().__init__(f"{path}: {len(problems)} problem(s)\n{listed}{rest}")


def read_jsonl(path: Path, problems: list[str]) -> dict[int, dict[str, Any]]:
    """The objects of a JSONL file by line number (from 1), blank lines left out; what is not one is a problem.

    Raises InputError if the file cannot be read at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, [str(error)]) from None
    rows = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number}: not JSON: {error}")
            continue
        if isinstance(row, dict):
            rows[number] = row
        else:
            problems.append(f"line {number}: expected an object, found {type(row).__name__}")
    return rows


def resume_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines that an earlier run wrote; a last line cut short by its end is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    problems: list[str] = []
    rows = read_jsonl(path, problems)
    if problems:
        raise InputError(path, [*problems, "the file was not written by this command: move it away"])
    return list(rows.values())


def write_lines(file: TextIO, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows, each whole line reaching the operating system before this returns."""
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
