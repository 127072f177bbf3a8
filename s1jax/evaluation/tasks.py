"""Problems with known answers: the benchmarks that s1 reports, and files of one's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from s1jax.data.sources import read_source
from s1jax.evaluation.grading import Kind
from s1jax.jsonl import InputError, Problem, Source, describe, keep_objects
from s1jax.paths import any_path


@dataclass(frozen=True)
class Question:
    """One problem of a task."""

    task: str
    id: str
    text: str
    answer: str
    kind: Kind


@dataclass(frozen=True)
class HubTask:
    """A benchmark on the Hugging Face hub; of the column names, the first that a row has counts."""

    path: str
    split: str
    num_questions: int = 0
    name: str | None = None
    question: tuple[str, ...] = ("problem", "question")
    answer: tuple[str, ...] = ("answer",)
    other_options: tuple[str, ...] = ()
    """Columns of a multiple-choice question's wrong options."""
    worked: bool = False
    """The answer stands after "####" at the end of a worked solution."""


TASKS = {
    "aime24": HubTask("simplescaling/aime24_nofigures", "train", 30),
    "aime25": HubTask("TIGER-Lab/AIME25", "train", 30),
    "math500": HubTask("HuggingFaceH4/MATH-500", "test", 500),
    "gpqa_diamond": HubTask(
        "Idavidrein/gpqa",
        "train",
        198,
        "gpqa_diamond",
        ("Question",),
        ("Correct Answer",),
        ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    ),
    "gsm8k": HubTask("openai/gsm8k", "test", 1319, "main", worked=True),
}


def load_tasks(tasks: Sequence[str], *, seed: int, limit: int | None) -> list[Question]:
    """The questions of several tasks, as `load_task` reads each.

    Raises InputError if two have one name: their results would be taken for each other's.
    """
    by_name: dict[str, str] = {}
    for task in tasks:
        name = _name(task)
        if name in by_name:
            raise InputError(f"tasks: {by_name[name]} and {task} have one name, {name}: give one of them another")
        by_name[name] = task
    return [question for task in tasks for question in load_task(task, seed=seed, limit=limit)]


def count_questions(tasks: Sequence[str], limit: int | None) -> int:
    """How many questions tasks have, at most `limit` each, without asking the hub. Raises InputError for files."""
    counts = [TASKS[task].num_questions if task in TASKS else len(read_source(task).rows) for task in tasks]
    return sum(min(count, limit or count) for count in counts)


def load_task(task: str, *, seed: int, limit: int | None) -> list[Question]:
    """The first `limit` questions of a task: a name in `TASKS`, or a file whose rows have `problem` and `answer`.

    GPQA's options are shuffled, by `seed`. Raises InputError listing every row that cannot be used, those among
    them that have the id of another one.
    """
    hub = TASKS.get(task)
    if hub is None and not any_path(task).is_file():
        raise InputError(f"{task}: neither a file nor a known task ({', '.join(TASKS)})")
    source = _read_hub(hub) if hub else read_source(task)
    layout = hub or HubTask(task, "")
    name = _name(task)
    rng = np.random.default_rng(seed)
    problems, questions = list(source.problems), []
    rows_by_id: dict[str, int] = {}
    for index, (number, row) in enumerate(source.rows):
        text, answer = _first(row, layout.question), _first(row, layout.answer)
        others = [_first(row, (key,)) for key in layout.other_options]
        columns = (layout.question, layout.answer, *((key,) for key in layout.other_options))
        missing = [keys[0] for keys, value in zip(columns, (text, answer, *others), strict=True) if value is None]
        if missing:
            problems += [Problem(number, f"{key}: expected a text, found {describe(row.get(key))}") for key in missing]
            continue
        identity = row.get("id", index)
        if not isinstance(identity, str | int) or isinstance(identity, bool):
            problems.append(Problem(number, f"id: expected a text or a whole number, found {describe(identity)}"))
            continue
        if first := rows_by_id.get(str(identity)):
            problems.append(Problem(number, f"id {str(identity)!r:.60} stands in {source.unit} {first} too"))
            continue
        rows_by_id[str(identity)] = number
        kind: Kind = "math"
        if layout.worked:
            answer = str(answer).rpartition("####")[2].strip()
        elif others:
            text, answer = _shuffled(str(text), [str(answer), *map(str, others)], rng)
            kind = "choice"
        questions.append(Question(name, str(identity), str(text), str(answer), kind))
    if problems:
        raise source.error(problems)
    return questions[:limit]


def _name(task: str) -> str:
    return task if task in TASKS else any_path(task).stem


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of these columns that holds a text or a number."""
    values = (row[key] for key in keys if isinstance(row.get(key), str | int | float))
    return next((str(value) for value in values if str(value).strip()), None)


def _shuffled(question: str, options: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """The question with its options in a random order, and the letter of the first of `options`."""
    order = rng.permutation(len(options)).tolist()
    lines = [f"{letter}) {options[i].strip()}" for letter, i in zip("ABCD", order, strict=True)]
    return "\n".join([question.strip(), "", *lines]), "ABCD"[order.index(0)]


def _read_hub(task: HubTask) -> Source:
    # Imported here: it takes a second.
    import datasets

    try:
        rows = datasets.load_dataset(task.path, task.name, split=task.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{task.path}: cannot be loaded from the hub: {error.__cause__ or error}") from error
    return keep_objects(task.path, "row", list(enumerate(rows, start=1)))
