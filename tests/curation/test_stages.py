"""attempt, grade and domains, with students, judge and classifier behind the local server or computed here."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s1jax.config import BudgetSection
from s1jax.curation.attempt import attempt
from s1jax.curation.distill import distill
from s1jax.curation.domains import CODES, domains
from s1jax.curation.endpoint import EndpointError
from s1jax.curation.grade import grade
from s1jax.curation.sections import DomainsSection, GradeSection, StudentSection
from s1jax.jsonl import InputError
from tests.curation.conftest import endpoint, rows, write_questions
from tests.curation.server import serving
from tests.curation.test_distill import NAMES, teacher

ANSWERS = {
    "half": ("\\frac{1}{2}", "So it is \\boxed{0.5}."),
    "third": ("\\frac{1}{3}", "So it is \\boxed{0.5}."),
    "seven": ("007", "Answer: 7"),
    "choice": ("B", "I take \\boxed{\\text{(B)}}"),
    "lost": ("3", "I cannot say."),
    "open": (None, "\\boxed{1}"),
}
"""A reference and an answer of each question."""
VERDICTS = {"half": "right", "third": "wrong", "seven": "right", "choice": "right", "lost": "wrong", "open": "ungraded"}


def message(content: str) -> dict[str, Any]:
    return {"content": ANSWERS[content.partition("\n")[0]][1], "reasoning_content": "Hm."}


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """A run directory with the answers above of the teacher and of the student named small."""
    lines = [{"id": key, "question": key, "answer": ANSWERS[key][0]} for key in ANSWERS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with serving(reply=message) as server:
        distill(teacher(server), tmp_path)
        assert attempt("small", StudentSection(endpoint=endpoint(server)), tmp_path)["done"] == len(ANSWERS)
    return tmp_path


def test_a_student_at_an_endpoint_is_asked_once(tmp_path: Path) -> None:
    output = write_questions(tmp_path, NAMES)
    faults = {NAMES[0]: ["cut"], NAMES[1]: ["400"], NAMES[2]: ["500", "empty"]}
    with serving(faults) as server:
        section = StudentSection(endpoint=endpoint(server))
        for _ in range(2):
            assert attempt("small", section, output) == {"done": 7, "failed": 1, "unasked": 0}
        assert server.asked == {**dict.fromkeys(NAMES, 1), NAMES[2]: 3}
        assert server.bodies[0]["messages"][0]["content"].endswith("Put your final answer within \\boxed{}.")
        attempt("large", section, output)
    attempts = {row["id"]: row for row in rows(output / "attempts-small.jsonl")}
    assert sorted(attempts) == NAMES
    assert attempts[NAMES[0]]["text"].startswith(f"The answer to {NAMES[0]}")
    assert (attempts[NAMES[1]]["status"], attempts[NAMES[1]]["text"]) == ("failed", None)
    assert len(rows(output / "attempts-large.jsonl")) == len(NAMES)


@pytest.mark.slow
def test_a_student_computed_here_goes_on_where_it_was_stopped(tmp_path: Path, directory: Path) -> None:
    output = write_questions(tmp_path, [*NAMES[:4], "What is this? " * 100])
    section = StudentSection(
        path=str(directory), dtype="float32", budget=BudgetSection(profile="none", max_answer_tokens=8), batch_size=16
    )
    assert attempt("tiny", section, output) == {"done": 4, "failed": 1, "unasked": 0}
    results = output / "attempts-tiny.jsonl"
    whole = rows(results)
    assert sorted(row["id"] for row in whole) == sorted([*NAMES[:4], "What is this? " * 100])
    assert [row["reason"] is None for row in whole] == [row["status"] == "done" for row in whole]
    results.write_bytes(results.read_bytes()[:-20])
    assert attempt("tiny", section, output) == {"done": 4, "failed": 1, "unasked": 0}
    assert sorted(rows(results), key=str) == sorted(whole, key=str)
    other = StudentSection(path=str(directory), dtype="float32")
    with pytest.raises(InputError, match="written with other values of budget"):
        attempt("tiny", other, output)


def test_a_student_is_either_here_or_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attempt small: give either endpoint\.base_url or path"):
        attempt("small", StudentSection(), tmp_path)


def test_math_verify_grades_teacher_and_student(answered: Path) -> None:
    counts = grade(GradeSection(), ["small"], answered)
    grades = rows(answered / "grades.jsonl")
    for who in ("teacher", "small"):
        assert {row["id"]: row["verdict"] for row in grades if row["who"] == who} == VERDICTS
        assert (counts[f"{who} right"], counts[f"{who} wrong"], counts[f"{who} ungraded"]) == (3, 2, 1)
    assert len(grades) == 2 * len(ANSWERS)
    assert {row["method"] for row in grades} == {"math-verify"}
    reasons = {row["id"]: row["reason"] for row in grades}
    assert reasons == {**dict.fromkeys(ANSWERS), "lost": "no answer found", "open": "no reference answer"}
    # Stopped while it wrote, it goes on, and keeps what was graded, even a verdict that it would not give.
    lines = (answered / "grades.jsonl").read_text().replace('"third", "who": "small", "verdict": "wrong"', "#")
    lines = lines.replace("#", '"third", "who": "small", "verdict": "right"')
    (answered / "grades.jsonl").write_text(lines[:-30])
    again = grade(GradeSection(), ["small"], answered)
    assert again == {**counts, "small right": 4, "small wrong": 1}
    assert len(rows(answered / "grades.jsonl")) == 2 * len(ANSWERS)


def test_answers_that_are_not_there_are_ungraded(tmp_path: Path) -> None:
    output = write_questions(tmp_path, NAMES)
    with pytest.raises(InputError, match=r"traces\.jsonl: not there; run the stage distill first"):
        grade(GradeSection(), [], output)
    with serving({NAMES[0]: ["400"], NAMES[1]: ["402"]}) as server:
        with pytest.raises(EndpointError):
            distill(teacher(server, concurrency=1), output)
        with pytest.raises(InputError, match=r"attempts-small\.jsonl: not there; run the stage attempt first"):
            grade(GradeSection(), ["small"], output)
        assert grade(GradeSection(), [], output) == {"teacher ungraded": 8}
        reasons = {row["id"]: row["reason"] for row in rows(output / "grades.jsonl")}
        assert reasons[NAMES[0]].startswith("no answer: HTTP 400")
        assert set(reasons.values()) - {reasons[NAMES[0]]} == {"not asked"}
        distill(teacher(server, retry_failed=True), output)
        assert grade(GradeSection(), [], output) == {"teacher wrong": 8}


def test_a_judge_grades_and_rubbish_is_ungraded(answered: Path) -> None:
    said = {
        "half": "The same.\nVerdict: right",
        "third": "Verdict: wrong",
        "seven": "Verdict: right or wrong",
        "choice": "**Verdict: right**",
        "lost": "Verdict: right\nOr is it?",
    }

    def reply(content: str) -> dict[str, Any]:
        question = re.search(r"<question>\n(.*)\n</question>", content)
        assert question
        reference, answer = ANSWERS[question[1]]
        assert f"<reference>\n{reference}\n</reference>" in content
        assert f"<attempt>\n{answer}\n</attempt>" in content
        return {"content": said[question[1]]}

    with serving({"half": ["500", "HTML"]}, reply) as server:
        section = GradeSection(method="judge", endpoint=endpoint(server, max_rubbish_retries=1))
        for _ in range(2):
            counts = grade(section, [], answered)
            assert counts == {"teacher right": 1, "teacher ungraded": 4, "teacher wrong": 1}
        assert server.asked == {"half": 3, "third": 1, "seven": 2, "choice": 2, "lost": 2}
        grades = {row["id"]: row for row in rows(answered / "grades.jsonl")}
        assert grades["half"]["verdict"] == "right"
        assert grades["third"]["verdict"] == "wrong"
        assert grades["lost"]["reason"] == "no verdict: 'Or is it?'"
        assert grades["open"]["reason"] == "no reference answer"
        assert {row["method"] for row in grades.values()} == {"judge"}
        # Another method does not go by these verdicts.
        assert grade(GradeSection(), [], answered)["teacher right"] == 3


def test_domains_are_two_digit_codes(tmp_path: Path) -> None:
    said = {
        "number": "11",
        "geometry": " 51.\n",
        "none": "02",
        "prose": "It is 11",
        "long": "111",
        "injected": "Ignore the codes",
    }
    output = write_questions(tmp_path, [*said, "known"])
    lines = [
        json.dumps({**row, "domain": "mine" if row["id"] == "known" else None}) + "\n"
        for row in rows(output / "questions.jsonl")
    ]
    (output / "filtered.jsonl").write_text("".join(lines))

    def reply(content: str) -> dict[str, Any]:
        assert all(f"\n{code} {name}\n" in content for code, name in CODES.items())
        return {"content": said[content.partition("<question>\n")[2].partition("\n")[0]]}

    with serving({"number": ["429", "drop"]}, reply) as server:
        section = DomainsSection(endpoint=endpoint(server, max_rubbish_retries=0))
        for _ in range(2):
            assert domains(section, output) == {"done": 2, "failed": 4, "unasked": 0}
        assert server.asked == {**dict.fromkeys(said, 1), "number": 3}
        # A benchmark has no traces, and so was never filtered.
        (output / "filtered.jsonl").rename(output / "questions.jsonl")
        with pytest.raises(InputError, match="run the stage filter first"):
            domains(section, output)
        assert domains(replace(section, ask_about="collected"), output) == {"done": 2, "failed": 4, "unasked": 0}
    found = {row["id"]: (row["code"], row["domain"]) for row in rows(output / "domains.jsonl")}
    assert found == {
        **dict.fromkeys(said, (None, None)),
        "number": ("11", "Number theory"),
        "geometry": ("51", "Geometry"),
    }
    assert len(CODES) == 63
