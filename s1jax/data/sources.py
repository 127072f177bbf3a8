"""Reads rows from a JSON Lines, JSON or Parquet file, or from a data set of the Hugging Face hub."""

import io
import re
from codecs import BOM_UTF8
from pathlib import Path

from pyarrow import ArrowException, parquet

from s1jax.jsonl import InputError, Source, describe, keep_objects, read_jsonl
from s1jax.paths import AnyPath, BucketPath, any_path
from s1jax.strict_json import parse_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_source(path: str, subset: str | None = None, split: str = "train") -> Source:
    """Read all rows of a .jsonl, .json (a list of objects) or .parquet file, a directory, or a hub data set.

    A file may be in a bucket. A local directory and a hub id ("owner/name", where no such file exists) go through
    `datasets.load_dataset` and give this split of this subset; to a file both mean nothing. Lines of white space alone
    are no rows.

    Raises:
        InputError: if there is no such file, it is of another kind, unreadable as a whole, or has no rows.
            A single bad row is no error here but a `Problem` in the result.
    """
    file = any_path(path)
    readers = {".jsonl": read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if file.is_file():
        if file.suffix not in readers:
            raise InputError(f"{path}: cannot read a '{file.suffix}' file, expected one of {', '.join(readers)}")
        source = readers[file.suffix](file)
    elif isinstance(file, BucketPath):
        raise InputError(f"{path}: no such file (of data sets in a directory, only local ones are read)")
    elif file.is_dir() or (HUB_ID.fullmatch(path) and file.suffix not in readers):
        source = _read_with_datasets(path, subset, split)
    else:
        raise InputError(f"{path}: no such file, and not the id of a hub data set (owner/name)")
    if not source.rows and not source.problems:
        raise InputError(f"{path}: there are no rows in it")
    return source


def _read_json(file: AnyPath) -> Source:
    hint = "expected a list of objects (one object per line belongs in a .jsonl file)"
    try:
        values = parse_json(file.read_bytes().removeprefix(BOM_UTF8), allow_nan=True)
    except ValueError as error:
        raise InputError(f"{file}: {error}; {hint}") from None
    if not isinstance(values, list):
        raise InputError(f"{file}: {hint}, found {describe(values)}")
    return keep_objects(str(file), "row", list(enumerate(values, start=1)))


def _read_parquet(file: AnyPath) -> Source:
    try:
        content = file if isinstance(file, Path) else io.BytesIO(file.read_bytes())
        # Not in Arrow's own threads, where a damaged file that asks for too much memory ends the whole process.
        values = parquet.read_table(content, use_threads=False).to_pylist()
    except (ArrowException, ValueError, OSError) as error:
        raise InputError(f"{file}: not readable as Parquet: {error!s:.500}") from None
    return keep_objects(str(file), "row", list(enumerate(values, start=1)))


def _read_with_datasets(path: str, subset: str | None, split: str) -> Source:
    # Imported here: it takes a second, and most runs read a file.
    import datasets

    try:
        values = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error
        raise InputError(
            f"{path}: no file of that name, and `datasets` cannot load it with a {split} split: {reason}"
        ) from error
    return keep_objects(path, "row", list(enumerate(values, start=1)))
