"""The one writer of JSON Lines: kills, full disks, other process counts and merges lose no row and double none."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.jsonl import FLUSH_SECONDS, InputError, RowWriter, merge_parts, written_rows
from s1jax.locks import InUseError, exclusive_file
from s1jax.paths import AnyPath, BucketPath, WriteError, files_below
from tests.processes import wait_until
from tests.small_disk import small_disk

ROOT = Path(__file__).parents[1]


def row(number: int) -> dict[str, Any]:
    return {"id": number, "text": "ä\n" * (number % 7), "value": number / 3}


def key(row: dict[str, Any]) -> Any:
    return row["id"]


def parts_of(path: AnyPath) -> list[str]:
    return [part.name for part in files_below(path.with_name(path.name + ".parts"))]


def test_rows_come_back_and_are_merged_in_order(root: AnyPath) -> None:
    path = root / "a.jsonl"
    assert written_rows(path) == []
    for process in (1, 0):
        with RowWriter(path, process, 2) as writer:
            writer.append(row(number) for number in range(5 + process, 0, -2))
            writer.append([])
    assert sorted(map(key, written_rows(path))) == [1, 2, 3, 4, 5, 6]
    assert not path.exists()
    for _ in range(2):
        merge_parts(path, key, key)
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == list(
            map(row, range(1, 7))
        )
        assert parts_of(path) == []
    assert written_rows(path) == list(map(row, range(1, 7)))


def test_one_process_on_a_disk_appends_to_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    with RowWriter(path) as writer:
        writer.append([row(1)])
        assert json.loads(path.read_bytes()) == row(1)
        writer.append([row(2)])
    before = path.read_bytes()
    merge_parts(path, key, order=lambda row: -row["id"])
    assert path.read_bytes() == before


def test_an_output_without_rows_is_an_empty_file(root: AnyPath) -> None:
    merge_parts(root / "a.jsonl", key)
    assert (root / "a.jsonl").read_bytes() == b""


def test_rows_for_a_bucket_are_not_held_back_for_long(bucket: BucketPath) -> None:
    path = bucket / "a.jsonl"
    with RowWriter(path) as writer:
        writer.append([row(1)])
        started = time.monotonic()
        wait_until(lambda: bool(written_rows(path)), [], seconds=0.2)
        assert time.monotonic() - started < 2 * FLUSH_SECONDS
        # The next rows make the same object longer.
        writer.append([row(2)])
        wait_until(lambda: written_rows(path) == [row(1), row(2)], [], seconds=0.2)
        assert parts_of(path) == ["0-0.jsonl"]
    with RowWriter(path) as writer:
        writer.append([row(3)])
    assert written_rows(path) == [row(1), row(2), row(3)]
    assert parts_of(path) == ["0-0.jsonl", "0-1.jsonl"]


def test_a_run_that_lost_its_lock_does_not_overwrite_a_part(bucket: BucketPath) -> None:
    path = bucket / "a.jsonl"
    with RowWriter(path) as old, RowWriter(path) as new:
        old.append([row(1)])
        new.append([row(2)])
    assert sorted(map(key, written_rows(path))) == [1, 2]


def test_nothing_is_written_without_the_lock(bucket: BucketPath) -> None:
    path = bucket / "a.jsonl"
    with exclusive_file(path) as lock:
        writer = RowWriter(path, lock=lock)
        writer.append([row(1)])
        (bucket / ".a.jsonl.lock" / "9").write_text("{}")
        lock._taken_over = True  # type: ignore[attr-defined]  # As after the next renewal, in 15 seconds.
        with pytest.raises(InUseError):
            writer.append([row(2)])
        with pytest.raises(InUseError):
            writer.close()
    assert written_rows(path) == []


@pytest.mark.parametrize("content", ['{"id": 1}\nnotes\n', "[1]\n"])
def test_what_is_no_output_is_refused(root: AnyPath, content: str) -> None:
    path = root / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=f"{path}: 1 problem") as raised:
        written_rows(path)
    assert "move it away" in str(raised.value)
    path.unlink()
    (root / "a.jsonl.parts").mkdir()
    (root / "a.jsonl.parts" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes.txt: .* move it away"):
        written_rows(path)


def test_a_cut_line_is_no_row_wherever_it_is(root: AnyPath) -> None:
    path = root / "a.jsonl"
    (root / "a.jsonl.parts").mkdir()
    parts = ("0.jsonl", "10.jsonl", "2.jsonl") if isinstance(root, Path) else ("0-0.jsonl", "0-10.jsonl", "0-2.jsonl")
    for number, file in enumerate((path, *(root / "a.jsonl.parts" / name for name in parts))):
        file.write_text(json.dumps(row(number)) + '\n{"id": 7, "te')
    assert list(map(key, written_rows(path))) == [0, 1, 3, 2]
    merge_parts(path, key, key)
    assert path.read_text(encoding="utf-8") == "".join(json.dumps(row(n), ensure_ascii=False) + "\n" for n in range(4))


@pytest.mark.parametrize("cut", ["", '{"id": 7, "te', '{"id"'])
def test_a_cut_line_is_removed_before_the_next_is_appended_and_at_the_end(root: AnyPath, cut: str) -> None:
    path = root / "a.jsonl"
    whole = json.dumps(row(0)) + "\n"
    path.write_text(whole + cut)
    merge_parts(path, key)
    assert path.read_text(encoding="utf-8") == whole
    path.write_text(whole + cut)
    with RowWriter(path) as writer:
        writer.append([row(1)])
    assert written_rows(path) == [row(0), row(1)]


@given(data=st.data())
@settings(max_examples=60)
def test_no_sequence_of_kills_and_merges_loses_or_doubles_a_row(data: st.DataObject) -> None:
    """On a disk, where a kill can come within a line; in a bucket it cannot, and real processes are killed below."""
    total = 12
    with TemporaryDirectory() as directory:
        path = Path(directory) / "a.jsonl"
        known: set[int] = set()
        """What earlier runs wrote whole: no later one may find less."""
        for _ in range(data.draw(st.integers(1, 4), label="runs")):
            done = list(map(key, written_rows(path)))
            assert known <= set(done) <= set(range(total))
            count = data.draw(st.integers(1, 3), label="processes")
            writers = [RowWriter(path, process, count) for process in range(count)]
            missing = [number for number in range(total) if number not in done]
            taken = data.draw(st.integers(0, len(missing)), label="rows of this run")
            for number in missing[:taken]:
                data.draw(st.sampled_from(writers), label="by").append([row(number)])
            known = set(done) | set(missing[:taken])
            for writer in writers:
                writer.close()
            if data.draw(st.booleans(), label="killed within a line"):
                file = data.draw(st.sampled_from([f for f in files_below(Path(directory)) if f.suffix == ".jsonl"]))
                assert isinstance(file, Path)
                content = file.read_bytes()
                cut = data.draw(st.integers(0, len(content)), label="bytes left")
                os.truncate(file, cut)
                # A line that an earlier kill cut is no row, and stays until its process appends again.
                whole = content[: content.rfind(b"\n") + 1].splitlines()
                known -= {json.loads(line)["id"] for line in whole[content[:cut].count(b"\n") :]}
            if data.draw(st.booleans(), label="merged"):
                parts = path.with_name("a.jsonl.parts")
                copy = parts.with_name("copy")
                if parts.exists():
                    shutil.copytree(parts, copy)
                merge_parts(path, key, key)
                for part in sorted(copy.glob("*")) if copy.exists() else ():
                    # Killed before this one was removed.
                    if data.draw(st.booleans(), label=f"{part.name} is still there"):
                        parts.mkdir(exist_ok=True)
                        part.rename(parts / part.name)
                shutil.rmtree(copy, ignore_errors=True)
        done = list(map(key, written_rows(path)))
        with RowWriter(path, 0, 2) as writer:
            writer.append(row(number) for number in range(total) if number not in done)
        merge_parts(path, key, key)
        assert written_rows(path) == list(map(row, range(total)))
        assert not path.with_name("a.jsonl.parts").exists()


RUN = """
import sys, time
from s1jax.jsonl import RowWriter
from s1jax.paths import any_path
from tests.test_jsonl import row
path, process, count, *numbers = sys.argv[1:]
with RowWriter(any_path(path), int(process), int(count)) as writer:
    for number in map(int, numbers):
        writer.append([row(number)])
        time.sleep(0.2)
    time.sleep(600)
"""


@pytest.mark.slow
def test_processes_killed_while_they_append_lose_and_double_nothing(root: AnyPath) -> None:
    path, total, chance = root / "a.jsonl", 200, random.Random(0)
    for round_, count in enumerate((2, 1, 3)):
        done = set(map(key, written_rows(path)))
        missing = [str(number) for number in range(total) if number not in done]
        processes = []
        for process in range(count):
            words = [str(path), str(process), str(count), *missing[process::count]]
            processes.append(subprocess.Popen([sys.executable, "-c", RUN, *words], cwd=ROOT, text=True))
        wait_until(lambda done=done: len(set(map(key, written_rows(path)))) > len(done), processes, 0.1)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 1))
        for process_ in processes:
            process_.send_signal(signal.SIGKILL)
            process_.wait(timeout=30)
        assert done <= set(map(key, written_rows(path)))
        if round_ == 1:
            merge_parts(path, key)
    done = set(map(key, written_rows(path)))
    assert 0 < len(done) < total
    with RowWriter(path) as writer:
        writer.append(row(number) for number in range(total) if number not in done)
    merge_parts(path, key, key)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == list(map(row, range(total)))


@pytest.mark.parametrize("count", [1, 2])
def test_a_disk_that_is_full_for_a_moment_leaves_whole_lines(tmp_path: Path, count: int) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "a.jsonl"
        file = path if count == 1 else disk / "a.jsonl.parts" / "0.jsonl"
        (disk / "other").write_bytes(b"x" * 2**15)
        with RowWriter(path, 0, count) as writer:
            written = 0
            error = None
            while error is None and written < 100:
                try:
                    writer.append([{"id": written, "text": "x" * 1500}])
                    written += 1
                except WriteError as found:
                    error = found
            assert re.fullmatch(f"{file}: No space left on device; .* intact", str(error))
            assert written > 0
            assert file.read_bytes().endswith(b"\n")
            with pytest.raises(WriteError):
                writer.append([{"id": written, "text": "x" * 1500}])
            (disk / "other").unlink()
            writer.append([{"id": written, "text": "x" * 1500}])
        assert list(map(key, written_rows(path))) == list(range(written + 1))


def test_a_writer_that_cannot_take_back_a_cut_line_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with small_disk(tmp_path / "disk", "16k") as disk:
        path = disk / "a.jsonl"
        (disk / "other").write_bytes(b"x" * 2**12)
        with RowWriter(path) as writer:
            writer.append([row(1)])
            monkeypatch.setattr(os, "ftruncate", refuse)
            with pytest.raises(WriteError, match="removed by the next start"):
                writer.append([{"id": 2, "text": "x" * 20_000}])
            (disk / "other").unlink()
            with pytest.raises(OSError, match=f"earlier write failed.*{path}"):
                writer.append([row(3)])
        assert written_rows(path) == [row(1)]


def test_the_error_that_ended_a_run_is_the_one_that_is_said(bucket: BucketPath) -> None:
    path = BucketPath(bucket.scheme, "no-such-bucket/a.jsonl")
    with pytest.raises(WriteError, match=r"no-such-bucket/a.jsonl.parts: .* intact$"), RowWriter(path) as writer:
        writer.append([row(1)])

    def fail() -> None:
        with RowWriter(path) as writer:
            writer.append([row(1)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
