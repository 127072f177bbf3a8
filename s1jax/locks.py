"""One run at a time writes an output: flock on a disk, a lease in a bucket.

In a bucket the lock at PATH is the object PATH/N with the highest number N. It is taken by creating the next one, which
of several contenders one does, and stays there when it is given up, marked as free; so numbers only grow. Its holder
overwrites it again and again: who finds it unchanged for a whole lease may take it. Each looks at its own clock only.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from s1jax.paths import AnyPath, BucketPath

LEASE_SECONDS = 60.0
_RENEWALS = 4
"""In one lease."""


class InUseError(RuntimeError):
    """Another run writes here, or has taken over because this one did not show that it lives."""


class Lock:
    """The right to write an output, as long as `lost` is False."""

    @property
    def lost(self) -> bool:
        """Whether another run may write now. On a disk the operating system sees to that: never."""
        return False

    def check(self) -> None:
        """Raise InUseError if the lock is lost; asks nobody, so that it can be called before each write."""


@contextlib.contextmanager
def exclusive_file(output: AnyPath) -> Iterator[Lock]:
    """Hold the lock of a file that is written, `.NAME.lock` beside it. Raises as `exclusive` does."""
    with exclusive(output.with_name(f".{output.name}.lock"), output) as lock:
        yield lock


@contextlib.contextmanager
def exclusive_directory(directory: AnyPath) -> Iterator[Lock]:
    """Hold the lock of a directory that is written, `.lock` in it. Raises as `exclusive` does."""
    with exclusive(directory / ".lock", directory) as lock:
        yield lock


@contextlib.contextmanager
def exclusive(path: AnyPath, output: AnyPath | None = None, *, lease: float = LEASE_SECONDS) -> Iterator[Lock]:
    """Hold the lock at `path`, which goes with the process, however it ends.

    `output` is named in errors if it is not `path`; `lease` is in seconds, the same for all contenders. In a bucket a
    holder that died on another machine is noticed after a lease, one on this machine at once. Raises InUseError if
    another run holds the lock, OSError if it cannot be taken.
    """
    name = str(output or path)
    if isinstance(path, BucketPath):
        held = _Lease(path, name, lease)
        try:
            yield held
        finally:
            held.release()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(name) from None
        except OSError as error:
            raise OSError(error.errno, f"cannot be locked ({error.strerror})", str(path)) from None
        yield Lock()


@dataclass(frozen=True)
class _Holder:
    """Who holds a lock, as its object says."""

    nonce: str
    machine: str
    """Boot and process namespace: where this is the same, process ids mean the same processes."""
    process: Annotated[int, Field(gt=0, lt=2**31)]
    started: str
    host: str
    count: int = 0
    """Of the renewals."""
    free: bool = False
    """The lock has been given up."""

    def encode(self, count: int, free: bool = False) -> bytes:
        """The object's content after so many renewals."""
        return json.dumps({**self.__dict__, "count": count, "free": free}).encode()


class _Lease(Lock):
    """The lock of a bucket, kept by a thread that renews it."""

    def __init__(self, path: BucketPath, name: str, lease: float):
        self._path, self._name, self._lease = path, name, lease
        self._me = _Holder(secrets.token_hex(8), _machine(), os.getpid(), _started(os.getpid()), socket.gethostname())
        self._number = 0
        self._renewed = time.monotonic()
        self._taken_over = False
        self._released = threading.Event()
        self._take()
        self._thread = threading.Thread(target=self._renew, name=f"lock of {name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another run has taken over, or may have, since renewing failed for a whole lease."""
        return self._taken_over or time.monotonic() - self._renewed > self._lease

    def check(self) -> None:
        """Raise InUseError if the lock is lost."""
        if self._taken_over:
            raise InUseError(f"{self._name}: another run has taken over writing here: stopped")
        if self.lost:
            raise InUseError(
                f"{self._name}: the store took no sign of life for {self._lease:g} s, so that another run may have "
                "taken over: stopped"
            )

    def release(self) -> None:
        """Give the lock up. A failure is no error: the lease runs out by itself."""
        self._released.set()
        self._thread.join()
        if not self._taken_over:
            with contextlib.suppress(OSError):
                (self._path / str(self._number)).write_bytes(self._me.encode(0, free=True))

    def _take(self) -> None:
        number = self._await_free()
        mine = self._path / str(number + 1)
        content = self._me.encode(0)
        self._renewed = time.monotonic()
        if not mine.create(content) and _read(mine) != content:  # A retried request finds what the first one made.
            raise _in_use(self._name)
        numbers = _numbers(self._path)
        if (
            max(numbers, default=0) != number + 1
        ):  # This one was slow: the number had been given, and removed as an old one.
            mine.unlink(missing_ok=True)
            raise _in_use(self._name)
        self._number = number + 1
        for old in numbers:
            if old != self._number:
                (self._path / str(old)).unlink(missing_ok=True)

    def _await_free(self) -> int:
        """The highest number, once its holder is gone; 0 if there has never been one."""
        seen: tuple[int, bytes] | None = None
        deadline = 0.0
        while True:
            number = max(_numbers(self._path), default=0)
            content = _read(self._path / str(number)) if number else None
            if content is None:
                if number:
                    continue  # Removed since it was listed: there is a higher one.
                return 0
            holder = _decode(content, self._path / str(number))
            if holder.free or _gone(holder):
                return number
            if (seen and seen != (number, content)) or holder.machine == self._me.machine != "":
                raise _in_use(self._name, f" (process {holder.process} on {holder.host})")
            if seen is None:
                seen, deadline = (number, content), time.monotonic() + self._lease
                print(
                    f"{self._name}: process {holder.process} on {holder.host} has left a lock; waiting up to "
                    f"{self._lease:g} s to see whether it lives",
                    file=sys.stderr,
                )
            elif time.monotonic() > deadline:
                return number
            time.sleep(self._lease / 20)

    def _renew(self) -> None:
        mine, count = self._path / str(self._number), 0
        while not self._released.wait(self._lease / _RENEWALS):
            started, count = time.monotonic(), count + 1
            try:
                if max(_numbers(self._path), default=0) > self._number:
                    self._taken_over = True
                    return
                mine.write_bytes(self._me.encode(count))
            except OSError:
                continue  # `lost` looks at the time since the last success.
            self._renewed = started


def _numbers(path: BucketPath) -> list[int]:
    return [int(entry.name) for entry in path.iterdir() if entry.name.isdecimal()]


def _read(path: BucketPath) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _decode(content: bytes, path: BucketPath) -> _Holder:
    try:
        return TypeAdapter(_Holder).validate_json(content, strict=True)
    except ValueError:
        raise OSError(errno.EINVAL, "expected a lock that this program wrote: move it away", str(path)) from None


def _in_use(name: str, who: str = "") -> InUseError:
    return InUseError(f"{name}: another run is writing here{who}; wait for it or name another output")


def _machine() -> str:
    """This boot of this machine and this namespace of process ids; "" where they cannot be told (not Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process was started, in the kernel's ticks; "" if it has ended or that cannot be told."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _gone(holder: _Holder) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if holder.machine != _machine() or not holder.machine:
        return False
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # Another user's, of which /proc may say nothing.
    return _started(holder.process) != holder.started
