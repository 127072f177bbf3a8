"""The demo's data: right where the teacher checked, disjoint, and the same for the same seed."""

import json
import re
from pathlib import Path

import numpy as np

from s1jax.demo.problems import DIGITS, LABELS, Problem, draw_problems, teach, write_data


def worked(text: str) -> list[list[tuple[str, int, int]]]:
    """The passes of a trace: label, step and result of each line."""
    passes = []
    for part in text.split("start: ")[1:]:
        lines = re.finditer(r"^(\w) (\w+): (\w+)$", part, re.MULTILINE)
        passes.append([(m[1], DIGITS.index(m[2]), DIGITS.index(m[3])) for m in lines])
    return passes


def test_a_problem_in_words_and_its_answer() -> None:
    problem = Problem(2, (3, 6, 4))
    assert problem.question == (
        "Start with two, add and keep the last digit each time:\na three\nb six\nc four\nWhat comes out?"
    )
    assert problem.answer == 5


def test_every_pass_but_the_first_is_right_and_the_answer_is_that_of_the_last() -> None:
    rng = np.random.default_rng(0)
    slips = checks = 0
    for problem, _ in zip(draw_problems(rng), range(2000), strict=False):
        trace, answer = teach(problem, rng)
        passes = worked(trace)
        checks += len(passes) > 1
        for number, steps in enumerate(passes):
            assert [(label, step) for label, step, _ in steps] == list(zip(LABELS, problem.steps, strict=False))
            value = problem.start
            for _, step, result in steps:
                slipped = result != (value + step) % 10
                assert not slipped or (number == 0 and (step, value, result) == (6, 8, 5))
                slips += slipped
                value = result
        assert answer == passes[-1][-1][2]
        assert answer == problem.answer or len(passes) == 1
    assert 0.35 < checks / 2000 < 0.45
    assert 60 < slips < 250


def test_train_and_test_are_disjoint_and_follow_from_the_seed(tmp_path: Path) -> None:
    files = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        files[name] = [path.read_text() for path in write_data(tmp_path / name, seed=seed, num_train=300, num_test=100)]
    assert files["a"] == files["b"] != files["c"]
    train, test = ([json.loads(line) for line in text.splitlines()] for text in files["a"])
    assert not {row["question"] for row in train} & {row["problem"] for row in test}
    assert set(train[0]) == {"question", "thinking_trajectories", "attempt"}
    assert (len(train), len(test)) == (300, 100)
