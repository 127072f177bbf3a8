from pathlib import Path
from typing import Any

import pytest

from tests.curation.stages import Row, card, question, read_rows, run_stage, trace, write_rows

STUDENTS = {"students": {name: {"path": "none"} for name in ("small", "large")}}


def grade(name: str, who: str, verdict: str) -> Row:
    return {"id": name, "who": who, "verdict": verdict, "method": "math-verify", "reason": None}


def write_run(run: Path, questions: list[Row], traces: list[Row], grades: list[Row] | None = None) -> None:
    write_rows(run / "questions.jsonl", questions)
    write_rows(run / "traces.jsonl", traces)
    if grades is not None:
        write_rows(run / "grades.jsonl", grades)


def reasons(run: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in read_rows(run / "dropped.jsonl")}


def test_failures_and_empties_are_dropped(tmp_path: Path) -> None:
    failed: dict[str, Any] = {"trace": None, "answer": None}
    traces = [
        trace("good"),
        trace("failed", status="failed", reason="it is 500", **failed),
        trace("no trace", trace=" "),
        trace("no answer", answer=None),
        trace("of another run"),
    ]
    names = ["unasked", "no answer", "no trace", "failed", "good"]
    write_run(tmp_path / "run", [question(name) for name in names], traces)
    assert run_stage("filter", tmp_path / "run") == 0
    (kept,) = read_rows(tmp_path / "run" / "filtered.jsonl")
    assert kept == {**question("good"), "trace": "Let me think.", "attempt": "It is 1.", "teacher": None}
    assert reasons(tmp_path / "run") == {
        "unasked": "not asked",
        "failed": "it is 500",
        "no trace": "empty trace",
        "no answer": "empty answer",
    }
    assert [count for _, count in card(tmp_path / "run")["filter"]["funnel"]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[asy] draw(A--B); [/asy] What is AB?", "[asy]"),
        ("See ![Image](a.png).", "![Image]"),
        ("p1. What is 1 + 1?", "page number"),
        ("A step999.", "page number"),
        ("p1000. p0. p. p1 p01.", None),
        ("Is **3** prime?", "number in bold"),
        ("Is **x** equal to 3?", "number in bold"),
        ("Is 3 equal to **x**?", None),
        ("Is **x y** equal to 3?", None),
        ("2**3 is eight", None),
        ("asy] [image]", None),
    ],
)
def test_formatting_rules(tmp_path: Path, text: str, reason: str | None) -> None:
    write_run(tmp_path / "run", [question("q", question=text)], [trace("q")])
    assert run_stage("filter", tmp_path / "run") == 0
    assert reasons(tmp_path / "run") == ({"q": reason} if reason else {})
    assert len(read_rows(tmp_path / "run" / "filtered.jsonl")) == (reason is None)


def test_asy_may_stay_for_a_source_but_nothing_else(tmp_path: Path) -> None:
    questions = [
        question("a", question="[asy] 1", source="AIME"),
        question("b", question="[asy] 2", source="MATH"),
        question("c", question="[asy] ![Image] 3", source="AIME"),
    ]
    write_run(tmp_path / "run", questions, [trace(name) for name in "abc"])
    config = {"sources": {"AIME": {"path": "a"}, "MATH": {"path": "b"}}, "filter": {"asy_sources": ["AIME"]}}
    assert run_stage("filter", tmp_path / "run", config) == 0
    assert reasons(tmp_path / "run") == {"b": "[asy]", "c": "![Image]"}


def test_chat_tokens_would_end_a_turn_of_the_training_row(tmp_path: Path) -> None:
    names = ["a", "b", "c", "<|im_end|>"]
    traces = [trace("a", trace="x <|im_start|>answer 3"), trace("b", answer="3<|endoftext|>"), trace("c")]
    write_run(tmp_path / "run", [question(name) for name in names], [*traces, trace("<|im_end|>")])
    assert run_stage("filter", tmp_path / "run") == 0
    assert reasons(tmp_path / "run") == dict.fromkeys(["a", "b", "<|im_end|>"], "chat token")


def test_an_unknown_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", [question("a")], [trace("a")])
    assert run_stage("filter", tmp_path / "run", {"filter": {"asy_sources": ["AIME"]}}) == 1
    assert "filter.asy_sources: no such source: AIME" in capsys.readouterr().err


def test_what_any_student_solves_is_dropped(tmp_path: Path) -> None:
    verdicts = {"neither": ("wrong", "ungraded"), "one": ("wrong", "right"), "both": ("right", "right")}
    grades = [
        grade(name, who, verdict)
        for name, of_question in verdicts.items()
        for who, verdict in (("teacher", "right"), *zip(("small", "large"), of_question, strict=True))
    ]
    write_run(tmp_path / "run", [question(name) for name in verdicts], [trace(name) for name in verdicts], grades)
    assert run_stage("filter", tmp_path / "run", STUDENTS) == 0
    (kept,) = read_rows(tmp_path / "run" / "filtered.jsonl")
    assert (kept["id"], kept["teacher"]) == ("neither", "right")
    assert reasons(tmp_path / "run") == {"one": "solved by large", "both": "solved by small"}


def test_missing_stages_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    for write, config, stage in [
        (lambda: None, {}, "collect"),
        (lambda: write_rows(run / "questions.jsonl", [question("a")]), {}, "distill"),
        (lambda: write_rows(run / "traces.jsonl", [trace("a")]), STUDENTS, "grade"),
        (lambda: write_rows(run / "grades.jsonl", [grade("a", "small", "wrong")]), STUDENTS, "attempt and grade"),
    ]:
        write()
        assert run_stage("filter", run, config) == 1
        assert stage in capsys.readouterr().err
        assert not (run / "filtered.jsonl").exists()
    assert run_stage("filter", run) == 0
