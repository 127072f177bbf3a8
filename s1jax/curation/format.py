"""The stage format: s1K rows for train.py, and a split for validation."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from s1jax.curation.card import Entry
from s1jax.curation.config import FormatSection
from s1jax.curation.files import stage_output
from s1jax.jsonl import InputError, replace_rows, stream_rows
from s1jax.paths import AnyPath, write_whole

_Row = dict[str, Any]
_TYPES = ("jsonl", "parquet")


_COLUMNS = {
    **dict.fromkeys(("id", "question", "source", "domain", "trace", "attempt"), str),
    "answer": str | None,
    "metadata": object,
}
"""Of selected.jsonl, with the types of their values."""


def format_rows(section: FormatSection, output_dir: AnyPath) -> Entry:
    """Write selected.jsonl as s1K rows in a random order: train, and validation if there is to be one.

    Raises InputError if nothing would be left to train on, or files cannot be used.
    """
    selected = stage_output(output_dir, "selected.jsonl", "select")
    rows = [_s1k_row(row) for row in stream_rows(selected, **_COLUMNS)]
    if len(rows) <= section.validation:
        raise InputError(
            f"format: {len(rows)} questions are selected, and format.validation asks for {section.validation} of them"
        )
    order = np.random.default_rng(section.seed).permutation(len(rows)).tolist()
    splits = {
        "validation": [rows[i] for i in order[: section.validation]],
        "train": [rows[i] for i in order[section.validation :]],
    }
    for name, split in splits.items():
        if split:
            _write(output_dir / f"{name}.{section.type}", split)
        for other in _TYPES:
            if not split or other != section.type:
                (output_dir / f"{name}.{other}").unlink(missing_ok=True)
    return Entry(tables={"rows": {name: len(split) for name, split in splits.items()}})


def _s1k_row(row: _Row) -> _Row:
    # Metadata is text, as in s1K: a column of Parquet has one type.
    return {
        "id": row["id"],
        "question": row["question"],
        "solution": row["answer"],
        "source_type": row["source"],
        "domain": row["domain"],
        "metadata": json.dumps(row["metadata"], ensure_ascii=False),
        "thinking_trajectories": [row["trace"]],
        "attempt": row["attempt"],
    }


def _write(path: AnyPath, rows: list[_Row]) -> None:
    if path.suffix == ".jsonl":
        replace_rows(path, rows)
        return
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), buffer)
    write_whole(path, buffer.getvalue().to_pybytes())
