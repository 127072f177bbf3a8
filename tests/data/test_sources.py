"""Files of rows on a disk and in both stores read alike."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from s1jax.data.sources import read_source
from s1jax.jsonl import InputError
from s1jax.paths import AnyPath, BucketPath, write_whole

ROWS = [{"id": 1, "text": "ä"}, {"id": 2, "text": "b"}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_come_from_anywhere(root: AnyPath, tmp_path: Path, suffix: str) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "local")
    content = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        "json": json.dumps(ROWS).encode(),
        "parquet": (tmp_path / "local").read_bytes(),
    }
    path = root / f"rows.{suffix}"
    write_whole(path, content[suffix])
    source = read_source(str(path))
    assert source.rows == [(1, ROWS[0]), (2, ROWS[1])]
    assert source.path == str(path)


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_file_of_another_kind_is_named(root: AnyPath, suffix: str) -> None:
    path = root / f"rows.{suffix}"
    write_whole(path, b"[1")
    with pytest.raises(InputError, match=f"^{path}: not "):
        read_source(str(path))


def test_what_is_not_there_is_named(bucket: BucketPath) -> None:
    for missing in (f"{bucket}/none.jsonl", f"{bucket.scheme}://no-such-bucket/rows.jsonl"):
        with pytest.raises(InputError, match=f"^{missing}: no such file"):
            read_source(missing)
    (bucket / "directory" / "rows.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="only local ones are read"):
        read_source(f"{bucket}/directory")
