"""Rows of an input file with what is wrong with them, and JSON Lines files that a stopped run goes on with."""

import contextlib
import errno
import json
import os
import re
import threading
from codecs import BOM_UTF8
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from s1jax.locks import InUseError, Lock
from s1jax.paths import AnyPath, BucketPath, WriteError, file_size, files_below, read_range, remove_tree, replacing
from s1jax.strict_json import parse_json

LISTED_PROBLEMS = 20
FLUSH_SECONDS = 5.0
"""Rows for a bucket are held back no longer, if the store answers."""
_PARTS = ".parts"
_PART_BYTES = 2**20
_READERS = 16
_CHUNK_BYTES = 2**24
_INTACT = "the lines before are intact"


class InputError(ValueError):
    """Input that cannot be used; the message says where, what was found and what was expected."""


class Problem(NamedTuple):
    """What is wrong with the row of that number."""

    number: int
    text: str


@dataclass(frozen=True)
class Source:
    """All rows of one source: the readable ones, and what is wrong with the others.

    A row keeps the number it is known by outside: a line of a JSON Lines file, else a row, both from 1.
    """

    path: str
    unit: Literal["line", "row"]
    rows: list[tuple[int, dict[str, Any]]]
    problems: list[Problem]

    def error(self, problems: list[Problem]) -> InputError:
        """One error for all of these problems, in the order of the rows; the first 20 of them in words."""
        in_order = sorted(problems, key=lambda problem: problem.number)
        listed = [f"  {self.unit} {number}: {text}" for number, text in in_order[:LISTED_PROBLEMS]]
        if len(problems) > len(listed):
            listed.append(f"  ... and {len(problems) - len(listed)} more")
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        return InputError("\n".join([f"{self.path}: {count} ({self.unit}s count from 1)", *listed]))


def describe(value: object) -> str:
    """A value that was found where another was expected, in a few words."""
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"


def keep_objects(path: str, unit: Literal["line", "row"], values: list[tuple[int, Any]]) -> Source:
    """A source of these numbered values; one that is not an object with named fields is a problem."""
    rows = [(number, value) for number, value in values if isinstance(value, dict)]
    problems = [
        Problem(number, f"expected an object with named fields, found {describe(value)}")
        for number, value in values
        if not isinstance(value, dict)
    ]
    return Source(path, unit, rows, problems)


def read_jsonl(path: AnyPath) -> Source:
    """The objects of a JSON Lines file; lines of white space alone are no rows.

    Raises InputError if the file cannot be read at all.
    """
    try:
        return _parse(str(path), path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _parse(path: str, content: bytes) -> Source:
    values, problems = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            # Many a data set has NaN in columns that nobody reads.
            values.append((number, parse_json(line.removeprefix(BOM_UTF8), allow_nan=True)))
        except ValueError as error:
            problems.append(Problem(number, str(error)))
    source = keep_objects(path, "line", values)
    source.problems.extend(problems)
    return source


def is_begun(path: AnyPath) -> bool:
    """Whether an earlier run has left this output, or parts of it."""
    return path.is_file() or bool(_parts(path))


def written_rows(path: AnyPath, **columns: Any) -> list[dict[str, Any]]:
    """All whole rows that earlier runs, of however many processes, left of this output: its file's, then its parts'.

    A row may be there twice after a kill. A last line that is not whole, cut short by the end of a run or being
    written, is none. Nothing is changed. `columns` are those that each row has, and the types of their values. Raises
    InputError if there is anything else in a file, OSError if one cannot be read.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        while True:
            parts = _parts(path)
            # Looked for after the parts: another process may make it of them at this moment, and then remove them.
            files = [*([path] if path.is_file() else []), *parts]
            try:
                sources = list(pool.map(lambda file: _parse(str(file), _whole_lines(file)), files))
                break
            except FileNotFoundError:
                continue
    for source in sources:
        wrong = ((number, _wrong_column(row, columns)) for number, row in source.rows)
        if problems := [*source.problems, *(Problem(number, text) for number, text in wrong if text)]:
            raise InputError(f"{source.error(problems)}\nthe file was not written by this command: move it away")
    return [row for source in sources for _, row in source.rows]


def _wrong_column(row: dict[str, Any], columns: Mapping[str, Any]) -> str | None:
    for key, kind in columns.items():
        if key not in row:
            return f"it has no {key}"
        if not isinstance(row[key], kind):
            return f"{key} is {describe(row[key])}"
    return None


def stream_rows(path: AnyPath, **columns: Any) -> Iterator[dict[str, Any]]:
    """The rows of `written_rows`, one at a time, of an output that may be too large for memory."""
    for file in [*([path] if path.is_file() else []), *_parts(path)]:
        for number, line in enumerate(_lines(file), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = parse_json(line, allow_nan=True)
            except ValueError:
                row = None
            wrong = _wrong_column(row, columns) if isinstance(row, dict) else "it is no object in JSON"
            if wrong:
                raise InputError(f"{file}: line {number}: {wrong}: it was not written by this command: move it away")
            yield row


def merge_parts(
    path: AnyPath, key: Callable[[dict[str, Any]], Hashable], order: Callable[[dict[str, Any]], Any] | None = None
) -> None:
    """Make one file of an output, each key once, sorted by `order` if it is given, and remove the parts.

    A file of whole lines without parts stays as it is. Nothing is lost if this is killed or done twice. No process may
    append meanwhile. Raises InputError as `written_rows` does, and OSError.
    """
    if path.is_file() and not _parts(path) and _ends_a_line(path):
        return
    rows: dict[Hashable, dict[str, Any]] = {}
    for row in written_rows(path):
        rows.setdefault(key(row), row)
    replace_rows(path, sorted(rows.values(), key=order) if order else rows.values())


def replace_rows(path: AnyPath, rows: Iterable[dict[str, Any]]) -> None:
    """Make these rows all that there is of an output, also more than fit in memory.

    Raises WriteError, which leaves the output as it was, as does what the iterable raises.
    """
    with replacing(path) as file:
        file.writelines(_encode([row]) for row in rows)
    remove_tree(path.with_name(path.name + _PARTS))


class RowWriter:
    """Appends rows to an output, for which `written_rows` is the reader and `merge_parts` the end.

    One process alone that writes to a disk appends to the file itself. Otherwise each process writes parts: appended
    files on a disk; in a bucket objects, replaced by longer ones every few seconds. There is never half a line before
    a whole one.
    """

    def __init__(self, path: AnyPath, process: int = 0, count: int = 1, *, lock: Lock | None = None):
        """Write as `process` of `count`, numbered from 0, for as long as `lock` is held. Raises WriteError.

        A last line that was cut short by the end of an earlier run is removed from the file that is appended to.
        """
        self._lock = lock or Lock()
        self._target: _PartObjects | _AppendedFile
        if isinstance(path, BucketPath):
            self._target = _PartObjects(path.with_name(path.name + _PARTS), process, self._lock)
        else:
            self._target = _AppendedFile(
                path if count == 1 else path.with_name(path.name + _PARTS) / f"{process}.jsonl"
            )

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write these rows, which reach a disk's operating system before this returns, a bucket a little later.

        Raises WriteError, of an earlier call's rows too, and InUseError if the lock is lost. The rows are then not
        written, those before are intact, and one may try again.
        """
        self._lock.check()
        self._target.append(_encode(rows))

    def flush(self) -> None:
        """Write what is held back, before something is written that rests on it. Raises as `append` does."""
        self._target.flush()

    def close(self) -> None:
        """Write what is held back. Raises as `append` does."""
        self._target.close()

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # What ended the block is said, not that closing failed after it.
        with contextlib.suppress(*((OSError, InUseError) if kind else ())):
            self.close()


class _AppendedFile:
    """A file on a disk."""

    def __init__(self, path: Path):
        self._path = path
        self._broken = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            if not _ends_a_line(path):
                os.truncate(path, len(_whole_lines(path)))
        except OSError as error:
            raise WriteError(path, error, "nothing was written") from None

    def append(self, content: bytes) -> None:
        if self._broken:
            raise OSError(errno.EIO, "an earlier write failed and could not be taken back", str(self._path))
        before = os.fstat(self._file.fileno()).st_size
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException as error:
            intact = _INTACT
            try:
                os.ftruncate(self._file.fileno(), before)
            except OSError:
                self._broken, intact = True, f"{_INTACT}, a cut one at the end is removed by the next start"
            if isinstance(error, OSError):
                raise WriteError(self._path, error, intact) from None
            raise

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise WriteError(self._path, error, "its last lines may be lost") from None


class _PartObjects:
    """The objects that one process writes into a bucket, from a thread of its own."""

    def __init__(self, directory: BucketPath, process: int, lock: Lock):
        self._directory, self._process, self._lock = directory, process, lock
        own = [sequence for number, sequence in map(_part_number, directory.iterdir()) if number == process]
        self._sequence = max(own, default=-1)
        self._part: BucketPath | None = None
        self._content = b""
        """Of the part, which is replaced by a longer one until it is large."""
        self._pending = bytearray()
        self._guard = threading.Lock()
        """Of `_pending`."""
        self._writing = threading.Lock()
        self._error: OSError | InUseError | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._flush_in_time, name=f"writer of {directory}", daemon=True)
        self._thread.start()

    def append(self, content: bytes) -> None:
        error, self._error = self._error, None
        if error:
            raise error
        with self._guard:
            self._pending += content

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.flush()

    def _flush_in_time(self) -> None:
        while not self._closed.wait(FLUSH_SECONDS):
            try:
                self.flush()
            except (OSError, InUseError) as error:
                self._error = error

    def flush(self) -> None:
        with self._writing:
            self._flush()

    def _flush(self) -> None:
        with self._guard:
            rows = bytes(self._pending)
        if not rows:
            return
        self._lock.check()
        try:
            if self._part and len(self._content) + len(rows) <= _PART_BYTES:
                self._part.write_bytes(self._content + rows)
                self._content += rows
            else:
                self._part, self._content = self._create(rows), rows
        except OSError as error:
            raise WriteError(self._directory, error, _INTACT) from None
        with self._guard:
            del self._pending[: len(rows)]

    def _create(self, content: bytes) -> BucketPath:
        while True:
            self._sequence += 1
            part = self._directory / f"{self._process}-{self._sequence}.jsonl"
            # A retried request finds what the first one made; other content is that of a run that lost its lock.
            if part.create(content) or part.read_bytes() == content:
                return part


def _encode(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _whole_lines(path: AnyPath) -> bytes:
    """A file's content up to its last end of a line."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _lines(path: AnyPath) -> Iterator[bytes]:
    """The lines of a file, each with its end."""
    if isinstance(path, Path):
        with path.open("rb") as file:
            yield from file
        return
    rest = b""
    for start in range(0, path.size(), _CHUNK_BYTES):
        *lines, rest = (rest + path.read_range(start, start + _CHUNK_BYTES)).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def _ends_a_line(path: AnyPath) -> bool:
    last, size = bytearray(b"\n"), file_size(path)
    if size:
        read_range(path, size - 1, memoryview(last))
    return last == b"\n"


def _parts(path: AnyPath) -> list[AnyPath]:
    """The parts of an output, by process and sequence."""
    return sorted(files_below(path.with_name(path.name + _PARTS)), key=_part_number)


def _part_number(path: AnyPath) -> tuple[int, int]:
    """Process and sequence in the name of a part; the sequence is 0 on a disk, where there is one part for each."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?\.jsonl", path.name)
    if not match:
        raise InputError(f"{path}: it was not written by this command: move it away")
    return int(match[1]), int(match[2] or 0)
