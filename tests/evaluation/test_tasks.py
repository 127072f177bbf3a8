"""A result belongs to exactly one question: ids and names that two have are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from s1jax.evaluation.tasks import load_tasks
from s1jax.jsonl import InputError


def task(path: Path, *ids: Any) -> str:
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1), **identity} for i, identity in enumerate(ids)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (({"id": "a"}, {"id": "a"}), "line 2: id 'a' stands in line 1 too"),
        (({"id": 7}, {"id": "7"}), "line 2: id '7' stands in line 1 too"),
        (({"id": "1"}, {}), "line 2: id '1' stands in line 1 too"),
        (({"id": None},), "line 1: id: expected a text or a whole number, found null"),
        (({"id": [1]},), "line 1: id: expected a text or a whole number"),
        (({"id": True},), "line 1: id: expected a text or a whole number"),
        (({"id": 1.5},), "line 1: id: expected a text or a whole number"),
    ],
)
def test_an_id_is_one_questions_own(ids: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_tasks([task(tmp_path / "a.jsonl", *ids)], seed=0, limit=None)
    assert message in str(error.value)


def test_a_name_is_one_tasks_own(tmp_path: Path) -> None:
    paths = [task(tmp_path / folder / "a.jsonl", {}) for folder in ("x", "y")]
    for two in (paths, [paths[0], paths[0]]):
        with pytest.raises(InputError, match=r"a\.jsonl and .*a\.jsonl have one name, a"):
            load_tasks(two, seed=0, limit=None)


def test_other_ids_are_kept_as_texts(tmp_path: Path) -> None:
    paths = [task(tmp_path / "a.jsonl", {"id": 7}, {"id": "x"}, {}), task(tmp_path / "b.jsonl", {"id": 7})]
    assert [(q.task, q.id) for q in load_tasks(paths, seed=0, limit=None)] == [
        ("a", "7"),
        ("a", "x"),
        ("a", "2"),
        ("b", "7"),
    ]
