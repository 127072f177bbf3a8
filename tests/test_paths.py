"""Local paths and those of two object stores behave alike; the stores' servers are real ones on loopback."""

import subprocess
import sys
from pathlib import Path

import pytest

from s1jax.paths import (
    AnyPath,
    BucketPath,
    PathError,
    any_path,
    file_size,
    files_below,
    read_range,
    remove_tree,
    write_whole,
)

ROOT = Path(__file__).parents[1]


def test_what_is_written_whole_is_read_whole_and_in_ranges(root: AnyPath) -> None:
    path = root / "deep" / "a.txt"
    assert not path.exists()
    write_whole(path, "hällo")
    write_whole(path, "hallo")
    assert path.read_text(encoding="utf-8") == "hallo"
    assert file_size(path) == 5
    out = bytearray(4)
    assert read_range(path, 1, memoryview(out)) == 4
    assert out == b"allo"
    assert read_range(path, 3, memoryview(out)) == 2
    assert (path.is_file(), path.is_dir()) == (True, False)
    assert (path.parent.is_file(), path.parent.is_dir()) == (False, True)


def test_listing_and_removing(root: AnyPath) -> None:
    tree = root / "tree"
    for name in ("b", "a", "sub/c"):
        write_whole(tree / name, name)
    assert sorted(p.name for p in tree.iterdir()) == ["a", "b", "sub"]
    assert [str(p.relative_to(tree)) for p in files_below(tree)] == ["a", "b", "sub/c"]  # type: ignore[arg-type]
    (tree / "a").unlink()
    (tree / "a").unlink(missing_ok=True)
    remove_tree(tree)
    remove_tree(tree)
    assert not tree.exists()
    assert files_below(tree) == []


def test_a_missing_file_is_named(root: AnyPath) -> None:
    with pytest.raises(FileNotFoundError, match=f"{root}/none"):
        (root / "none").read_bytes()
    (root / "none").unlink(missing_ok=True)


def test_of_several_that_create_one_object_one_does(bucket: BucketPath) -> None:
    lock = bucket / "lock"
    program = f"from s1jax.paths import any_path; print(any_path('{lock}').create(b'x'))"
    processes = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE) for _ in range(4)
    ]
    assert sorted(process.communicate(timeout=120)[0].strip() for process in processes) == ["False"] * 3 + ["True"]


def test_a_stores_checksum_follows_the_content(bucket: BucketPath) -> None:
    path = bucket / "sum"
    path.write_text("one")
    before = path.checksum()
    path.write_text("two")
    assert path.checksum() != before
    path.write_text("one")
    assert path.checksum() == before


def test_a_missing_bucket_is_said_in_one_line(bucket: BucketPath) -> None:
    nowhere = any_path(f"{bucket.scheme}://no-such-bucket/x")
    with pytest.raises(OSError, match=f"{bucket.scheme}://no-such-bucket/x") as raised:
        nowhere.write_bytes(b"1")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["hdfs://a/b", "http://a/b", "az://c/d", "gcs://a/b", "file:///a", "gs://", "s3:///"])
def test_other_schemes_and_nameless_buckets_are_refused(text: str) -> None:
    with pytest.raises(PathError):
        any_path(text)


def test_local_paths_stay_what_they_are() -> None:
    assert any_path("runs/gs:/x") == Path("runs/gs:/x")
    assert any_path("~/x") == Path.home() / "x"
    assert str(any_path("gs://bucket/a/b/")) == "gs://bucket/a/b"
    assert (any_path("s3://bucket/a.jsonl").parent / "b.jsonl").suffix == ".jsonl"
