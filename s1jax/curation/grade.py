"""The stage grade: whether the answers of teacher and students are right, by math-verify or by a judge."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from s1jax.curation.files import read_questions
from s1jax.curation.judge import Case, judge
from s1jax.curation.sections import GradeSection
from s1jax.evaluation.grading import Grader, Kind
from s1jax.jsonl import InputError, RowWriter, merge_parts, replace_rows, stream_rows, written_rows
from s1jax.paths import AnyPath
from s1jax.progress import progress

_Row = dict[str, Any]
_CHOICE = re.compile(r"\(?[A-J]\)?")


def grade(section: GradeSection, students: Sequence[str], output_dir: AnyPath) -> dict[str, int]:
    """Grade what traces.jsonl and attempts-NAME.jsonl answer; grades.jsonl has a line for each question and answerer.

    Verdicts of an earlier run by the same method stay; what was ungraded is graded again, but the judge is asked once.
    Returns the counts of "WHO VERDICT". Raises InputError, and with a judge as `ask_all` does.
    """
    questions = {question["id"]: question for question in read_questions(output_dir)}
    results = output_dir / "grades.jsonl"
    kept = {
        (row["who"], row["id"]): row
        for row in written_rows(results, who=str, id=str, method=str, verdict=str)
        if row["method"] == section.method and row["verdict"] != "ungraded"
    }
    rows: list[_Row] = []
    cases: dict[tuple[str, str], Case] = {}
    for who in ("teacher", *students):
        answers = _answers(who, output_dir)
        for identity, question in questions.items():
            case = _case(who, question, answers.get(identity))
            if (who, identity) in kept:
                rows.append(kept[who, identity])
            elif isinstance(case, Case):
                cases[who, identity] = case
            else:
                rows.append(_row(who, identity, section.method, "ungraded", case))
    if section.method == "judge":
        rows += _judged(section, cases, output_dir)
        replace_rows(results, rows)
    else:
        replace_rows(results, rows)
        rows += _verified(section, cases, results)
    counts = Counter(f"{row['who']} {row['verdict']}" for row in rows)
    return dict(sorted(counts.items()))


def _answers(who: str, output_dir: AnyPath) -> dict[str, _Row]:
    """What is known of each answer: its text, or why there is none."""
    name, stage, key = (
        ("traces.jsonl", "distill", "answer") if who == "teacher" else (f"attempts-{who}.jsonl", "attempt", "text")
    )
    path = output_dir / name
    if not path.exists():
        raise InputError(f"{path}: not there; run the stage {stage} first")
    rows = stream_rows(path, **{"id": str, "reason": str | None, key: str | None})
    return {row["id"]: {"text": row[key], "reason": row["reason"]} for row in rows}


def _case(who: str, question: _Row, answer: _Row | None) -> Case | str:
    """What is to be graded, or why nothing is."""
    if question.get("answer") in (None, ""):
        return "no reference answer"
    if answer is None:
        return "not asked"
    if answer["text"] is None:
        return f"no answer: {answer['reason']}"
    return Case(f"{who} {question['id']}", question["question"], str(question["answer"]), answer["text"])


def _row(who: str, identity: str, method: str, verdict: str, reason: str | None) -> _Row:
    return {"id": identity, "who": who, "verdict": verdict, "method": method, "reason": reason}


def _verified(section: GradeSection, cases: dict[tuple[str, str], Case], results: AnyPath) -> list[_Row]:
    """Grade by math-verify, adding each row to the file."""
    rows = []
    grader = Grader(section.grading_seconds)
    try:
        with RowWriter(results) as writer, progress("answer", len(cases), name="grade") as bar:
            for (who, identity), case in cases.items():
                kind: Kind = "choice" if _CHOICE.fullmatch(case.reference.strip()) else "math"
                found = grader.grade(case.attempt, case.reference, kind)
                rows.append(_row(who, identity, section.method, found.verdict, found.reason))
                writer.append(rows[-1:])
                bar.update()
    finally:
        grader.close()
    merge_parts(results, key=lambda row: (row["who"], row["id"]))
    return rows


def _judged(section: GradeSection, cases: dict[tuple[str, str], Case], output_dir: AnyPath) -> list[_Row]:
    """Grade by asking the judge."""
    judge(section.endpoint, cases.values(), output_dir)
    kept = stream_rows(output_dir / "verdicts.jsonl", id=str, verdict=str | None, reason=str | None)
    verdicts = {row["id"]: row for row in kept}
    rows = []
    for (who, identity), case in cases.items():
        found = verdicts.get(case.id, {"verdict": None, "reason": "not asked"})
        rows.append(_row(who, identity, section.method, found["verdict"] or "ungraded", found["reason"]))
    return rows
