"""Verdicts on answers that a person can check at sight, and on those that break or stall the grader."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from s1jax.evaluation.answer_text import extract_answer
from s1jax.evaluation.grading import Grader
from tests.evaluation.labelled import KINDS, labelled_answers

LINES = Path(__file__).with_name("grading_cases.txt").read_text(encoding="utf-8").splitlines()
CASES = [line for line in LINES if not line.startswith("#")]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    grader = Grader(time_limit=20.0)
    yield grader
    grader.close()


def test_the_cases_are_many() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str, grader: Grader) -> None:
    # The reference may hold a "|" itself.
    text, _, rest = case.partition(" | ")
    reference, _, verdict = rest.rpartition(" | ")
    kind = "choice" if text.startswith("choice: ") else "math"
    grade = grader.grade(text.removeprefix("choice: ").replace("\\n", "\n"), reference, kind)
    assert grade.verdict == verdict, grade


@pytest.mark.slow
def test_of_answers_of_known_truth_few_are_misjudged_and_few_are_left(grader: Grader) -> None:
    # Another seed than the benchmark's.
    cases = labelled_answers(seed=1)
    grades = [grader.grade(case.text, case.reference) for case in cases]
    counts = Counter((case.right, grade.verdict) for case, grade in zip(cases, grades, strict=True))
    misjudged = [
        (case, grade)
        for case, grade in zip(cases, grades, strict=True)
        if grade.verdict != ("right" if case.right else "wrong")
    ]
    assert len(cases) >= 1000
    assert {case.kind for case in cases} == {kind.__name__ for kind in KINDS}
    assert counts[False, "right"] <= len(cases) / 1000, misjudged
    assert counts[True, "wrong"] <= 5 * len(cases) / 1000, misjudged
    assert counts[True, "ungraded"] + counts[False, "ungraded"] <= 40 * len(cases) / 1000, misjudged


@pytest.mark.parametrize("length", [4_300, 4_301, 100_000])
def test_integers_of_any_length_are_graded(length: int, grader: Grader) -> None:
    digits = "7" * length
    assert grader.grade(rf"\boxed{{{digits}}}", digits).verdict == "right"
    assert grader.grade(rf"\boxed{{{digits}}}", digits[:-1] + "8").verdict == "wrong"
    assert grader.grade(rf"\boxed{{{digits}}}", r"\frac{1}{2}").verdict in ("wrong", "ungraded")


LONG = 100_000
HOSTILE = [
    *(
        "{" * LONG,
        "(" * LONG + "7" + ")" * LONG,
        r"\frac{" * 20_000,
        r"\boxed{" * 50_000,
        r"\text{" * 50_000,
        "Answer: " * 30_000,
    ),
    *(
        "-" * LONG + "4",
        "7" + "^7" * 5_000,
        "2" + "^{2" * 200 + "}" * 200,
        "(10^{12})!",
        "10^{10^{10^{10}}}",
        "1" + "+1" * 50_000,
    ),
    *(
        " " * LONG + "x",
        "*" * LONG,
        "$" * LONG,
        "\n" * LONG,
        "A " * 50_000,
        "a, " * 30_000,
        "1,000" * 20_000,
        "0." + "3" * LONG,
    ),
    *(
        "5 " + "m" * LONG,
        "12:" * 20_000,
        r"\begin{pmatrix}" * 10_000,
        r"\binom{10^9}{5 \cdot 10^8}",
        "\x00",
        "\ufffd" * 9,
        r"\frac{1}{0}",
    ),
]


@pytest.fixture(scope="module")
def impatient() -> Iterator[Grader]:
    grader = Grader(time_limit=3.0)
    yield grader
    grader.close()


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_a_model_writes_gets_a_verdict_in_time(text: str, impatient: Grader) -> None:
    started = time.monotonic()
    for answer, reference in ((text, "B"), (rf"\boxed{{{text}}}", r"\frac{7}{2}"), (f"Answer: {text}", "x^2+1")):
        assert impatient.grade(answer, reference).verdict in ("wrong", "ungraded")
    assert time.monotonic() - started < 30


def test_an_answer_that_takes_too_long_is_ungraded_and_the_next_is_graded() -> None:
    grader = Grader(time_limit=2.0)
    started = time.monotonic()
    stalled = grader.grade(r"\boxed{\int_0^{9^{9^{9}}} x^{x^x} dx}", "3")
    assert stalled.verdict == "ungraded"
    assert "took more than 2 s" in (stalled.reason or "")
    assert time.monotonic() - started < 30
    assert grader.grade(r"\boxed{\frac{1}{2}}", "0.5").verdict in ("right", "ungraded")
    grader.close()


def test_what_is_extracted() -> None:
    assert extract_answer("a \\boxed{x_{1}} b") == "x_{1}"
    assert extract_answer("Answer: 3 apples\nand more") == "3 apples"
    assert extract_answer("") is None
