"""One run at a time: real processes that hold, lose and take over locks, on a disk and in both stores."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from s1jax.locks import InUseError, exclusive, exclusive_directory, exclusive_file
from s1jax.paths import AnyPath, BucketPath, files_below
from tests.processes import wait_until

ROOT = Path(__file__).parents[1]
LEASE = 2.0
HOLDER = """
import sys, time
from s1jax import locks
from s1jax.paths import any_path
path, machine, lease = sys.argv[1:]
if machine:
    locks._machine = lambda: machine
with locks.exclusive(any_path(path), lease=float(lease)) as lock:
    print("held", flush=True)
    sys.stdin.readline()
    lock.check()
    print("still held", flush=True)
"""


@contextmanager
def holder(path: AnyPath, machine: str = "", lease: float = LEASE) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock until it gets a line, then says whether it still does; "" is this machine."""
    words = [sys.executable, "-c", HOLDER, str(path), machine, str(lease)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_second_is_refused_and_the_next_let_in(root: AnyPath) -> None:
    path = root / ".lock"
    with holder(path, lease=60) as process:
        started = time.monotonic()
        with pytest.raises(InUseError, match=f"{path}: another run is writing here") as raised, exclusive(path):
            pass
        assert time.monotonic() - started < 10
        assert "\n" not in str(raised.value)
        assert process.communicate("\n", timeout=30)[0] == "still held\n"
    for _ in range(3):
        with exclusive(path) as lock:
            lock.check()
            assert not lock.lost
    # What stays does not grow.
    assert len(files_below(root)) == 1


def test_one_process_is_refused_too(root: AnyPath) -> None:
    with (
        exclusive(root / ".lock"),
        pytest.raises(InUseError, match="another run is writing here"),
        exclusive(root / ".lock"),
    ):
        pass


def test_a_killed_holder_is_followed_at_once(root: AnyPath) -> None:
    path = root / ".lock"
    with holder(path, lease=60) as process:
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: _ended(process.pid), [])
        started = time.monotonic()
        with exclusive(path) as lock:
            lock.check()
            assert time.monotonic() - started < 10


def _ended(process: int) -> bool:
    """Whether it runs no more; nobody has waited for it, as where a shell was killed with its child."""
    return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"


def test_another_machines_living_holder_is_not_followed(bucket: BucketPath) -> None:
    with holder(bucket / ".lock", "elsewhere") as process:
        with pytest.raises(InUseError, match=rf"process {process.pid} on "), exclusive(bucket / ".lock", lease=LEASE):
            pass
        assert process.communicate("\n", timeout=30)[0] == "still held\n"


def test_another_machines_holder_that_stops_is_followed_after_the_lease_and_notices(
    bucket: BucketPath, capsys: pytest.CaptureFixture[str]
) -> None:
    with holder(bucket / ".lock", "elsewhere") as process:
        process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with exclusive(bucket / ".lock", lease=LEASE) as lock:
            assert LEASE <= time.monotonic() - started < 3 * LEASE
            lock.check()
            assert f"waiting up to {LEASE:g} s to see whether it lives" in capsys.readouterr().err
            process.send_signal(signal.SIGCONT)
            output = process.communicate("\n", timeout=30)[0]
            assert "InUseError" in output
            assert "still held" not in output
            time.sleep(LEASE)  # Long enough for a renewal.
            lock.check()


def test_a_holder_finds_that_another_took_over(bucket: BucketPath) -> None:
    with exclusive(bucket / ".lock", bucket, lease=LEASE) as lock:
        (bucket / ".lock" / "2").write_text("{}")
        wait_until(lambda: lock.lost, [])
        with pytest.raises(InUseError, match=f"{bucket}: another run has taken over"):
            lock.check()


@pytest.mark.slow
def test_of_many_at_once_one_holds(bucket: BucketPath) -> None:
    """All see a lock whose holder is gone, on another machine."""
    gone = {"nonce": "1", "machine": "elsewhere", "process": 1, "started": "1", "host": "h", "count": 3, "free": False}
    (bucket / ".lock" / "7").write_text(json.dumps(gone))
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", HOLDER, f"{bucket}/.lock", "", "5"]
    processes = [subprocess.Popen(words, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(4)]
    wait_until(lambda: sum(process.poll() is None for process in processes) == 1, [], seconds=0.1)
    outputs = [process.communicate("\n", timeout=60) for process in processes]
    assert sorted(output for output, _ in outputs) == ["", "", "", "held\nstill held\n"]
    assert all("InUseError" in errors for output, errors in outputs if not output)
    assert [path.name for path in files_below(bucket / ".lock")] == ["8"]


def test_what_is_no_lock_is_refused(bucket: BucketPath) -> None:
    (bucket / ".lock" / "1").write_text("my notes")
    with pytest.raises(OSError, match=f"{bucket}/.lock/1"), exclusive(bucket / ".lock"):
        pass


def test_where_the_locks_of_files_and_directories_are(tmp_path: Path) -> None:
    with (
        exclusive_file(tmp_path / "new" / "a.jsonl"),
        pytest.raises(InUseError, match=f"^{tmp_path}/new/a.jsonl: "),
        exclusive_file(tmp_path / "new" / "a.jsonl"),
    ):
        pass
    with exclusive_directory(tmp_path / "new"):
        pass
    assert sorted(os.listdir(tmp_path / "new")) == [".a.jsonl.lock", ".lock"]
