"""The processes of a decoding command: whose a request is, and how they make one output.

One model over all processes: each runs the same host loop on the same requests, and the first one alone reads the
output, writes, grades and prints. A copy of the model in each process (`mesh.copies`): requests are dealt by their
number, each process appends to a part of its own and asks no other for anything; whoever finds all requests done makes
one file of the parts.
"""

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

from s1jax.config import DecodingMeshSection
from s1jax.config_reader import to_dict
from s1jax.jsonl import RowWriter, merge_parts, written_rows
from s1jax.locks import InUseError, Lock, exclusive, exclusive_file
from s1jax.paths import AnyPath, remove_tree, write_whole
from s1jax.processes import START_SECONDS, Processes, broadcast, same_everywhere, start_processes, together

BEAT_SECONDS = 10.0
"""Between two signs of life of a process with a copy."""
GONE_BEATS = 6
"""A process that gives no sign of life for so long is gone, and the others end."""
_FINISHED = b"finished"
_MERGE_POLL_SECONDS = 0.5

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Hosts:
    """This process among those that run the same command."""

    processes: Processes
    copies: bool = False
    """Whether each has a copy of the model and its share of the requests, else all have one model."""

    @property
    def writes(self) -> bool:
        """Whether this process writes results."""
        return self.copies or self.processes.index == 0

    def deals(self, number: int) -> bool:
        """Whether the request of this number, among all that the command has, is this process's."""
        return not self.copies or number % self.processes.count == self.processes.index

    def told(self, read: Callable[[], T]) -> T:
        """What `read` returns, made of JSON's values; with one model the first process alone reads, and tells all."""
        if self.copies or self.processes.count == 1:
            return read()
        content = together(lambda: json.dumps(read()) if self.processes.index == 0 else "")
        told: T = json.loads(broadcast(content.encode()))
        return told


def start_hosts(mesh: DecodingMeshSection) -> Hosts:
    """Find the other processes, before jax looks for devices; raises as `start_processes` does."""
    processes = start_processes(mesh)
    return Hosts(processes, copies=mesh.copies is not None and processes.count > 1)


def same_command(config: Any, hosts: Hosts, requests: Any) -> None:
    """Check that all processes of one model have the same configuration and requests: else each would wait for others.

    Raises ProcessError that names what differs, and where.
    """
    if hosts.copies or hosts.processes.count == 1:
        return
    facts = to_dict(config)
    del facts["mesh"]["process_id"]
    same_everywhere({**{key: json.dumps(value) for key, value in facts.items()}, "requests": repr(requests)})


def to_host(tree: T) -> T:
    """The values of a tree's arrays, in every process. Under the mesh that the arrays are on."""
    host: T = jax.device_get(tree if jax.process_count() == 1 else _replicated(tree))
    return host


@jax.jit
def _replicated(tree: T) -> T:
    everywhere: T = jax.lax.with_sharding_constraint(tree, PartitionSpec())
    return everywhere


class SharedOutput:
    """A JSON Lines file that the processes of a command fill, each row once; a context that holds its lock.

    Raises InUseError if another run writes there.
    """

    def __init__(self, path: AnyPath, hosts: Hosts):
        """Nothing is read or written before the context is entered, and by processes that do not write nothing ever."""
        self.path, self._hosts = path, hosts
        self._lock = Lock()
        self._writer: RowWriter | None = None
        self._context = contextlib.ExitStack()
        self._beats = _Beats(path.with_name(f".{path.name}.alive"), hosts.processes)

    def __enter__(self) -> "SharedOutput":
        together(self._open)
        return self

    def _open(self) -> None:
        if self._hosts.writes:
            # A run of one process is the first of its kind, so that it and several keep each other out.
            index = self._hosts.processes.index
            own = self.path.with_name(f".{self.path.name}.{index}.lock")
            self._lock = self._context.enter_context(exclusive(own, self.path) if index else exclusive_file(self.path))
        if self._hosts.copies:
            self._context.enter_context(self._beats)

    def __exit__(self, *exception: Any) -> None:
        try:
            if self._writer:
                self._writer.__exit__(*exception)
        finally:
            self._context.close()

    def rows(self) -> list[Row]:
        """What all processes have written so far, in this run or before."""
        return written_rows(self.path)

    def append(self, rows: Iterable[Row]) -> None:
        """Write these rows, if it is for this process to write. Raises as `RowWriter` does."""
        if not self._hosts.writes:
            return
        if self._writer is None:
            processes = self._hosts.processes if self._hosts.copies else Processes()
            self._writer = RowWriter(self.path, processes.index, processes.count, lock=self._lock)
        self._writer.append(rows)

    @contextlib.contextmanager
    def merged(
        self,
        missing: Callable[[list[Row]], int],
        key: Callable[[Row], Hashable],
        order: Callable[[Row], Any] | None = None,
    ) -> Iterator[bool]:
        """Once this process is through: make one file of all parts, sorted by `order`, if no rows are `missing`.

        Gives whether this process did it, for what is to be made of all rows inside the context. It is True in one of
        the processes that write at the same time, or in the next one where that one fails; and False where others will
        do it, being still at work.
        """
        if self._writer:
            self._writer.close()
        self._beats.finish()
        if not self._hosts.writes:
            yield False
            return
        with self._alone() as to_do:
            left = missing(self.rows()) if self._hosts.copies and to_do else 0
            if left:
                who = f"process {self._hosts.processes.index} of {self._hosts.processes.count}"
                print(f"{self.path}: {who} is through; {left} of the others' are missing", file=sys.stderr, flush=True)
            elif to_do:
                self._lock.check()
                merge_parts(self.path, key, order)
            yield to_do and not left
            if not left:
                self._beats.clear()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """While no other process merges, which is waited for; gives whether none has done it since this one came."""
        if not self._hosts.copies:
            yield True
            return
        path = self.path.with_name(f".{self.path.name}.merge.lock")
        with contextlib.ExitStack() as held:
            while True:
                try:
                    held.enter_context(exclusive(path, self.path))
                    break
                except InUseError:
                    time.sleep(_MERGE_POLL_SECONDS)
            yield self._beats.kept()


class _Beats:
    """Signs of life of processes that share nothing but files: each writes its own, and ends when another's stop."""

    def __init__(self, directory: AnyPath, processes: Processes):
        self._directory, self._processes = directory, processes
        self._name = secrets.token_hex(4)
        """So that no sign is like one that an earlier run left."""
        self._came = directory / f"{processes.index}.came"
        """Written once, so that it is gone when all rows were merged after that."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)

    def __enter__(self) -> "_Beats":
        write_whole(self._came, self._name)
        self._beat(0)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def finish(self) -> None:
        """No more signs of life are to be expected of this process, and none are missed."""
        if self._thread.is_alive():
            self.__exit__()
            with contextlib.suppress(OSError):  # Of processes that are all through, another may clear at this moment.
                write_whole(self._directory / str(self._processes.index), _FINISHED)

    def kept(self) -> bool:
        """Whether nobody has cleared since this process came."""
        return self._came.exists()

    def clear(self) -> None:
        """All rows are merged. Each that finds it so clears after its own last sign, so that none is left."""
        remove_tree(self._directory)

    def _beat(self, count: int) -> None:
        write_whole(self._directory / str(self._processes.index), f"{self._name} {count}")

    def _read(self, peer: int) -> bytes:
        try:
            return (self._directory / str(peer)).read_bytes()
        except OSError:
            return b""

    def _run(self) -> None:
        peers = [peer for peer in range(self._processes.count) if peer != self._processes.index]
        last = {peer: self._read(peer) for peer in peers}
        changed = dict.fromkeys(peers, 0)
        """The beat at which each gave its last sign of life; 0: not yet seen to live."""
        beat = 0
        while not self._stopped.wait(BEAT_SECONDS):
            beat += 1
            with contextlib.suppress(OSError):  # If it lasts, the others notice.
                self._beat(beat)
            for peer in peers:
                sign = self._read(peer)
                if sign != last[peer]:
                    last[peer], changed[peer] = sign, beat
                patience = GONE_BEATS if changed[peer] else START_SECONDS / BEAT_SECONDS
                if sign != _FINISHED and beat - changed[peer] >= patience:
                    self._end(peer, "is gone" if changed[peer] else "has not come")

    def _end(self, peer: int, what: str) -> None:
        print(
            f"\nerror: process {peer} of {self._processes.count} {what}: stopped; what was written is kept, and the "
            "same command in all of them goes on",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
