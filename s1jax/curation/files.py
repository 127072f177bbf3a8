"""What one stage reads of another's files."""

from typing import Any

from s1jax.jsonl import InputError, Problem, describe, read_jsonl
from s1jax.paths import AnyPath


def read_questions(output_dir: AnyPath) -> list[dict[str, Any]]:
    """The rows of questions.jsonl, each with a text `id` of its own and a text `question`.

    Raises InputError if the file is not there, or with every line that cannot be used.
    """
    source = read_jsonl(stage_output(output_dir, "questions.jsonl", "collect"))
    problems, seen = list(source.problems), set()
    for line, row in source.rows:
        for key in ("id", "question"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                problems.append(Problem(line, f"{key}: expected a text, found {describe(row.get(key))}"))
        if "id" in row and str(row["id"]) in seen:
            problems.append(Problem(line, f"id {row['id']!r:.100} is that of an earlier line too"))
        seen.add(str(row.get("id")))
    if problems:
        raise source.error(problems)
    return [row for _, row in source.rows]


def stage_output(output_dir: AnyPath, name: str, stage: str) -> AnyPath:
    """The path of a file that a stage writes. Raises InputError that names the stage if it is not there."""
    path = output_dir / name
    if not path.exists():
        raise InputError(f"{path}: not there; run the stage {stage} first")
    return path
