"""The stage filter: drops questions without a trace, in a form that cannot be used, and those that a student solves."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from s1jax.config_reader import ConfigError
from s1jax.curation.card import Entry
from s1jax.curation.config import CurateConfig
from s1jax.curation.files import read_questions, stage_output
from s1jax.jsonl import InputError, replace_rows, stream_rows
from s1jax.paths import AnyPath

_Row = dict[str, Any]
_ASY = "[asy]"
FORMATTING = {
    _ASY: re.compile(r"\[asy\]"),
    "![Image]": re.compile(r"!\[Image\]"),
    "page number": re.compile(r"p[1-9][0-9]{0,2}\."),
    "number in bold": re.compile(r"\*\*(?=.*\d)[^\s\]]*\*\*"),
}
"""s1's rules: a question in which one of these is found is dropped."""
_CHAT_TOKEN = re.compile(r"<\|(im_start|im_end|endoftext)\|>")
"""In a training row it would begin or end a turn."""
STEPS = ("with a trace", "of usable form", "not solved by a student")


def filter_questions(config: CurateConfig, output_dir: AnyPath) -> Entry:
    """Write filtered.jsonl, each question with trace, attempt and teacher's verdict, and dropped.jsonl with reasons.

    Raises ConfigError, and InputError if the files of an earlier stage are not there or cannot be used.
    """
    unknown = set(config.filter.asy_sources) - set(config.sources)
    if unknown:
        raise ConfigError(f"filter.asy_sources: no such source: {', '.join(sorted(unknown))}")
    verdicts = _verdicts(config, output_dir)
    questions = {question["id"]: question for question in read_questions(output_dir)}
    traces = stage_output(output_dir, "traces.jsonl", "distill")
    dropped: list[_Row] = []

    def drop(question: _Row, step: str, reason: str) -> None:
        dropped.append({**question, "step": step, "reason": reason})

    def kept() -> Iterator[_Row]:
        waiting = dict(questions)
        for trace in stream_rows(traces, id=str, status=str, reason=str | None, trace=str | None, answer=str | None):
            question = waiting.pop(trace["id"], None)
            if question is None:
                continue
            verdict = verdicts.get(question["id"], {})
            reason = _problem(config, question, trace, verdict)
            if reason:
                drop(question, *reason)
            else:
                found = {"trace": trace["trace"], "attempt": trace["answer"], "teacher": verdict.get("teacher")}
                yield {**question, **found}
        for question in waiting.values():
            drop(question, STEPS[0], "not asked")

    replace_rows(output_dir / "filtered.jsonl", kept())
    replace_rows(output_dir / "dropped.jsonl", dropped)
    of_step = Counter(row["step"] for row in dropped)
    left, funnel = len(questions), []
    for step in STEPS:
        left -= of_step[step]
        funnel.append((step, left))
    return Entry(funnel, {"dropped": dict(Counter(_group(row) for row in dropped))})


def _group(row: _Row) -> str:
    """The reason of a row of dropped.jsonl, as the card counts it."""
    return "failed in distill" if row["step"] == STEPS[0] and row["reason"] != "not asked" else row["reason"]


def _problem(config: CurateConfig, question: _Row, trace: _Row, verdict: dict[str, str]) -> tuple[str, str] | None:
    """The step that drops this question, and why."""
    if trace["status"] != "done":
        return STEPS[0], trace["reason"]
    empty = [name for name in ("trace", "answer") if not (trace[name] or "").strip()]
    if empty:
        return STEPS[0], f"empty {' and '.join(empty)}"
    for name, pattern in FORMATTING.items():
        if pattern.search(question["question"]) and (
            name != _ASY or question["source"] not in config.filter.asy_sources
        ):
            return STEPS[1], name
    if any(_CHAT_TOKEN.search(text) for text in (question["question"], trace["trace"], trace["answer"])):
        return STEPS[1], "chat token"
    for student in config.students:
        if verdict.get(student) == "right":
            return STEPS[2], f"solved by {student}"
    return None


def _verdicts(config: CurateConfig, output_dir: AnyPath) -> dict[str, dict[str, str]]:
    """Of each question: who -> verdict. Without students grades.jsonl may be missing."""
    path = output_dir / "grades.jsonl"
    if config.students:
        stage_output(output_dir, path.name, "grade")
    elif not path.exists():
        return {}
    verdicts: dict[str, dict[str, str]] = {}
    seen = set()
    for row in stream_rows(path, id=str, who=str, verdict=str):
        verdicts.setdefault(row["id"], {})[row["who"]] = row["verdict"]
        seen.add(row["who"])
    missing = [student for student in config.students if student not in seen]
    if missing:
        raise InputError(f"{path}: no grades of {', '.join(missing)}; run the stages attempt and grade first")
    return verdicts
