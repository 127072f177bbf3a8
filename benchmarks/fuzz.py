"""Broken files of every kind that a command reads: python -m benchmarks.fuzz [--cases N] [--seed S] [--kinds NAME ...]

Each case damages one file of a small whole set, in its bytes or in its structure, and has it read as the commands do,
in a process with bounded time and memory. It must be accepted, or refused by an error that names it and that the
commands print; where a checksum or a rule could tell, what is accepted holds the same numbers. Prints how the cases of
each kind ended, and every case that ended otherwise; the same seed gives the same cases. Exit status 1 if there was
one.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import fuzz_files, fuzz_mutations

SECONDS = 60.0
"""For one case, on a busy machine; a template alone may take ten of a processor."""
MEMORY_BYTES = 4 * 2**30
_LONGEST_LINE = 5_000
_PRINTED = (ValueError, OSError, RuntimeError, ModuleNotFoundError)
"""What the commands print as a message, see s1jax.command."""
_RAW = (RecursionError, UnicodeError, json.JSONDecodeError, NotImplementedError)
"""Kinds of those that nobody wrote a message for."""
GOOD = ("accepted", "refused")
BAD = ("changed", "unclear", "traceback", "hang", "died")


class Ending(NamedTuple):
    """How a case ended."""

    outcome: str
    said: str = ""


def read_damaged(base: Path, kind: fuzz_files.Kind, seed: str) -> Ending:
    """Damage the kind's file below `base`, have it read, and put it back."""
    file = base / kind.file
    whole = file.read_bytes()
    content = fuzz_mutations.mutate(whole, kind.shape, random.Random(seed))
    file.write_bytes(content)
    try:
        with _bounded_memory():
            found = kind.read(base)
        if kind.same and not kind.same(whole, content, found):
            return Ending("changed", f"{len(content)} bytes: {content[:200]!r}")
        return Ending("accepted")
    except _PRINTED as error:
        said = str(error)
        if isinstance(error, _RAW):
            return Ending("traceback", traceback.format_exc())
        named = kind.anonymous or str(base) in said
        longest = max(map(len, said.splitlines()), default=0)
        return Ending("refused" if named and 0 < longest < _LONGEST_LINE else "unclear", said[:2000])
    # Whatever else there is, Rust's panics too, is what this looks for.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Ending("traceback", traceback.format_exc())
    finally:
        file.write_bytes(whole)


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Not around damaging: what Arrow writes may need more, and ends the process where it gets none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def work(base: Path) -> None:
    """Answer requests, one a line, each with a kind's name and a seed."""
    # The answers have this to themselves: what is read may print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    kinds = {kind.name: kind for kind in fuzz_files.KINDS}
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        name, seed = json.loads(line)
        print(json.dumps(read_damaged(base, kinds[name], seed)), file=answers, flush=True)


class Worker:
    """A process that reads damaged files below a copy of the set, begun anew when it ends or hangs."""

    def __init__(self, whole: Path, directory: Path):
        self._whole, self._base = whole, directory / "set"
        self._log = (directory / "log").open("w+b")
        self._process: subprocess.Popen[str] | None = None

    def run(self, name: str, seed: str) -> Ending:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps([name, seed]) + "\n")
        process.stdin.flush()
        line = self._answer(process, SECONDS)
        if line:
            return Ending(*json.loads(line))
        if line is None:
            self.close()
            return Ending("hang", f"more than {SECONDS:g} s")
        process.wait()
        self.close()
        self._log.seek(0)
        return Ending("died", f"status {process.returncode}: {self._log.read()[-2000:].decode(errors='replace')}")

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        shutil.rmtree(self._base, ignore_errors=True)
        shutil.copytree(self._whole, self._base)
        self._log.truncate(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fuzz", "--worker", str(self._base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"},
        )
        if not self._answer(process, 300.0):
            self._log.seek(0)
            raise RuntimeError(f"the worker does not start: {self._log.read().decode(errors='replace')}")
        return process

    @staticmethod
    def _answer(process: "subprocess.Popen[str]", seconds: float) -> str | None:
        """A line; an empty one if the process has ended, None after so many seconds."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else None


def fuzz(cases: int, seed: int, names: list[str], first: int = 0) -> dict[str, Counter[str]]:
    """The outcomes of so many cases, which go round the kinds, by kind; each bad one is printed as it comes."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    slowest = (0.0, "")
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        whole = Path(directory, "whole")
        fuzz_files.write_whole_set(whole)
        worker = Worker(whole, Path(directory))
        stack.callback(worker.close)
        began = time.monotonic()
        for number in range(first, first + cases):
            name = names[number % len(names)]
            started = time.monotonic()
            ending = worker.run(name, f"{seed}/{name}/{number}")
            slowest = max(slowest, (time.monotonic() - started, f"{name} {number}"))
            counts[name][ending.outcome] += 1
            if ending.outcome in BAD:
                print(f"--- {ending.outcome}: {name}, case {number} of seed {seed}\n{ending.said}", flush=True)
            if number % 1000 == 999:
                print(table(counts), f"{time.monotonic() - began:.0f} s, the slowest {slowest}", sep="\n", flush=True)
    return counts


def table(counts: dict[str, Counter[str]]) -> str:
    """The counts as lines, with a last one of all kinds."""
    rows = {**counts, "all": sum(counts.values(), Counter[str]())}
    heads = ["cases", *GOOD, *BAD]
    lines = [f"{'':<26}" + "".join(f"{head:>10}" for head in heads)]
    for name, count in rows.items():
        lines.append(f"{name:<26}" + "".join(f"{n:>10}" for n in (count.total(), *(count[h] for h in heads[1:]))))
    return "\n".join(lines)


def main(words: list[str]) -> int:
    names = [kind.name for kind in fuzz_files.KINDS]
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=names, choices=names)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options: Any = parser.parse_args(words)
    if options.worker:
        work(options.worker)
        return 0
    counts = fuzz(options.cases, options.seed, options.kinds, options.first)
    print(table(counts))
    return int(any(count[outcome] for count in counts.values() for outcome in BAD))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
