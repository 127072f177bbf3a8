"""The stage collect: the questions of all sources, each once, and none that an evaluation set has."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from s1jax.curation.card import Entry
from s1jax.curation.config import CurateConfig, EvaluationSetSection, SourceSection
from s1jax.curation.decontamination import Decontamination, EvaluationQuestion, fold
from s1jax.data.sources import read_source
from s1jax.jsonl import InputError, Problem, Source, describe, replace_rows
from s1jax.paths import AnyPath

_Row = dict[str, Any]


def collect(config: CurateConfig, output_dir: AnyPath) -> Entry:
    """Write questions.jsonl, and contaminated.jsonl with what each dropped question matched.

    Of equal questions the first stays. Raises InputError if a source or an evaluation set cannot be used.
    """
    decontamination = Decontamination(
        question for name, section in config.evaluation_sets.items() for question in _evaluation_set(name, section)
    )
    counts: Counter[str] = Counter()
    read: dict[str, int] = {}
    matched = dict.fromkeys(config.evaluation_sets, 0)
    exact, folded_texts = set(), set()
    questions: list[_Row] = []
    contaminated: list[_Row] = []
    for name, section in config.sources.items():
        rows = _source(name, section)
        read[name] = len(rows)
        for row in rows:
            folded = fold(row["question"])
            if not folded:
                counts["empty"] += 1
            elif row["question"] in exact:
                counts["exact duplicates"] += 1
            elif folded in folded_texts:
                counts["duplicates but for case and white space"] += 1
            else:
                row = {"id": hashlib.sha256(folded.encode()).hexdigest()[:16], **row}
                matches = decontamination.matches(folded)
                if matches:
                    contaminated.append({**row, "matches": [match._asdict() for match in matches]})
                    for evaluation_set in {match.evaluation_set for match in matches}:
                        matched[evaluation_set] += 1
                else:
                    questions.append(row)
            exact.add(row["question"])
            folded_texts.add(folded)
    if not questions:
        raise InputError(f"collect: none of {sum(read.values())} questions is left")
    replace_rows(output_dir / "contaminated.jsonl", contaminated)
    replace_rows(output_dir / "questions.jsonl", questions)
    duplicates = sum(counts.values())
    return Entry(
        [
            ("in the sources", sum(read.values())),
            ("with a question, each once", sum(read.values()) - duplicates),
            ("not in an evaluation set", len(questions)),
        ],
        {
            "questions by source": read,
            "left by source": dict(Counter(row["source"] for row in questions)),
            "dropped": dict(counts),
            "dropped as contaminated by": matched,
        },
    )


def _source(name: str, section: SourceSection) -> list[_Row]:
    """The rows of a source without ids; a question is "" where the column is null.

    Raises InputError with every row that cannot be used, or if a column is in none of them.
    """
    source = read_source(section.path, section.subset, section.split)
    of_key = {"question": section.question, "answer": section.answer, "domain": section.domain}
    columns = {f"sources.{name}.{key}": column for key, column in of_key.items() if column is not None}
    _check_columns(source, columns | {f"sources.{name}.metadata": column for column in section.metadata})
    rows, problems = [], list(source.problems)
    for number, row in source.rows[: section.limit]:
        found: dict[str, str | None] = dict.fromkeys(of_key)
        for key, column in of_key.items():
            value = row.get(column) if column is not None else None
            if isinstance(value, str | int | float):
                found[key] = str(value)
            elif value is not None:
                problems.append(Problem(number, f"{column}: expected a text, found {describe(value)}"))
        answer = found["answer"]
        if answer is not None and section.answer_after is not None:
            _, mark, answer = answer.rpartition(section.answer_after)
            if not mark:
                problems.append(Problem(number, f"{section.answer}: there is no {section.answer_after!r} in it"))
            answer = answer.strip()
        # What Parquet has and JSON has not, as dates, is kept as text.
        metadata = json.loads(json.dumps({column: row.get(column) for column in section.metadata}, default=str))
        rows.append(
            {
                "question": found["question"] or "",
                "answer": answer or None,
                "source": name,
                "domain": found["domain"],
                "metadata": metadata,
            }
        )
    if problems:
        raise source.error(problems)
    return rows


def _evaluation_set(name: str, section: EvaluationSetSection) -> Iterator[EvaluationQuestion]:
    source = read_source(section.path, section.subset, section.split)
    _check_columns(source, {f"evaluation_sets.{name}.question": section.question})
    problems = list(source.problems)
    for number, row in source.rows:
        text = row.get(section.question)
        if isinstance(text, str) and text.strip():
            yield EvaluationQuestion(name, number, text)
        else:
            problems.append(Problem(number, f"{section.question}: expected a text, found {describe(text)}"))
    if problems:
        raise source.error(problems)


def _check_columns(source: Source, columns: dict[str, str]) -> None:
    there = dict.fromkeys(key for _, row in source.rows for key in row)
    for key, column in columns.items():
        if source.rows and column not in there:
            raise InputError(f"{key}: {source.path} has no column {column!r}; it has {', '.join(map(repr, there))}")
