"""Contenders in processes of their own, taking turns: on a noisy machine only what alternates can be compared."""

import json
import os
import signal
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
OURS = "s1jax"


@dataclass(frozen=True)
class Answer:
    """What a contender says of one action."""

    seconds: float
    peak_bytes: int
    """The largest that its process has been."""
    result: Any


class Contender:
    """A process of `benchmarks.throughput.contenders`.

    Between its actions it is stopped with all its children: vLLM's wait for work in a busy loop, which slowed the
    others to half.
    """

    def __init__(self, name: str, python: str):
        self.name = name
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.throughput.contenders.{name}_contender"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def do(self, action: str, **arguments: Any) -> Answer:
        """Take one action. Raises RuntimeError if the contender is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(json.dumps({"action": action, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()} in {action}")
        os.killpg(self._process.pid, signal.SIGSTOP)
        return Answer(**json.loads(line))

    def end(self) -> None:
        """End it and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def contenders(pythons: dict[str, str]) -> Iterator[list[Contender]]:
    """Start contenders, each with its interpreter, and end them."""
    started = [Contender(name, python) for name, python in pythons.items()]
    try:
        yield started
    finally:
        for contender in started:
            contender.end()


@dataclass(frozen=True)
class Comparison:
    """One case measured: seconds of each contender in each round, less is better."""

    suite: str
    case: str
    goal: float
    """What `ratio` should reach."""
    seconds: dict[str, list[float]]
    settings: dict[str, Any]
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    """What else was seen, such as shares of equal tokens."""

    @property
    def best_peer(self) -> str:
        """The peer with the smallest median."""
        return min((name for name in self.seconds if name != OURS), key=lambda n: statistics.median(self.seconds[n]))

    @property
    def ratio(self) -> float:
        """How many times as long the best peer takes: the median over the rounds."""
        pairs = zip(self.seconds[self.best_peer], self.seconds[OURS], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def take_turns(names: Iterable[str], measure: Callable[[str], float], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each of `rounds` rounds, in which they are measured in turn, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name, kept in seconds.items():
            value = measure(name)
            if round_ > 0:
                kept.append(value)
    return seconds
