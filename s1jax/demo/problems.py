"""Arithmetic that takes many small dependent steps, and the traces of a teacher who works it out and checks it.

A problem starts with a digit and adds in labelled steps, keeping the last digit each time. No step can be done before
the one before it, so who must answer early can only guess. The teacher has one bad habit: at one sum it often slips,
and it stops more often than it checks. So its answers are not all right, and a student gains by being made to check.

Digits are written as words: with the space before it a word is one token, which a digit is not in Qwen's tokenizer. So
even a model this small learns to find the number beside a label, whatever the seed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

LABELS = "abcdefghij"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MIN_STEPS = 2
LARGEST_STEP = 6
SLIP_STEP, SLIP_VALUE, SLIP_SHARE = 6, 8, 0.8
"""At its first try, when it has done two steps, the teacher gets 8 + 6 wrong so often (by 1)."""
CHECK_SHARES = (0.6, 0.2, 0.1, 0.06, 0.04)
"""How often the teacher checks its work 0, 1, 2, 3 and 4 times before it answers."""


@dataclass(frozen=True)
class Problem:
    """A first digit, and what is added to it in each step."""

    start: int
    steps: tuple[int, ...]

    @property
    def question(self) -> str:
        """The problem in words."""
        lines = "".join(f"{label} {DIGITS[step]}\n" for label, step in zip(LABELS, self.steps, strict=False))
        return f"Start with {DIGITS[self.start]}, add and keep the last digit each time:\n{lines}What comes out?"

    @property
    def answer(self) -> int:
        """The digit after the last step."""
        return (self.start + sum(self.steps)) % 10


def draw_problems(rng: np.random.Generator) -> Iterator[Problem]:
    """Problems without end, no two of them the same."""
    seen = set()
    while True:
        count = rng.integers(MIN_STEPS, len(LABELS) + 1)
        steps = rng.integers(1, LARGEST_STEP + 1, count)
        problem = Problem(int(rng.integers(10)), tuple(steps.tolist()))
        if problem not in seen:
            seen.add(problem)
            yield problem


def teach(problem: Problem, rng: np.random.Generator) -> tuple[str, int]:
    """The teacher's trace of a problem, and the answer it comes to, which is wrong if it slipped and did not check."""
    trace, answer = _work_through(problem, rng, slips=True)
    for _ in range(rng.choice(len(CHECK_SHARES), p=CHECK_SHARES)):
        again, answer = _work_through(problem, rng, slips=False)
        trace += f"Wait, let me check.\n{again}"
    return trace, answer


def _work_through(problem: Problem, rng: np.random.Generator, slips: bool) -> tuple[str, int]:
    value = problem.start
    lines = [f"start: {DIGITS[value]}\n"]
    for i, (label, step) in enumerate(zip(LABELS, problem.steps, strict=False)):
        tempted = slips and i >= 2 and (step, value) == (SLIP_STEP, SLIP_VALUE)
        slipped = tempted and rng.random() < SLIP_SHARE
        value = (value + step + slipped) % 10
        lines.append(f"{label} {DIGITS[step]}: {DIGITS[value]}\n")
    return "".join(lines), value


def write_data(directory: Path, *, seed: int, num_train: int, num_test: int) -> tuple[Path, Path]:
    """Write training rows in s1K's format and a test set of problems and answers, with no problem in both."""
    rng = np.random.default_rng(seed)
    problems = draw_problems(rng)
    train, test = directory / "train.jsonl", directory / "test.jsonl"
    with test.open("w", encoding="utf-8") as file:
        for problem in islice(problems, num_test):
            file.write(json.dumps({"problem": problem.question, "answer": str(problem.answer)}) + "\n")
    with train.open("w", encoding="utf-8") as file:
        for problem in islice(problems, num_train):
            trace, answer = teach(problem, rng)
            row = {"question": problem.question, "thinking_trajectories": [trace], "attempt": f"Final Answer: {answer}"}
            file.write(json.dumps(row) + "\n")
    return train, test
