"""Runs stages of python -m s1jax.curate, and writes what earlier ones would have left."""

import json
from pathlib import Path
from typing import Any

import yaml

from s1jax.curate import main

Row = dict[str, Any]


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_stage(stage: str, run: Path, config: Row | None = None) -> int:
    """The exit status of a stage in the run directory `run`."""
    config = {"sources": {"s": {"path": "none.jsonl"}}, **(config or {}), "output_dir": str(run)}
    file = run.with_name(run.name + ".yaml")
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return main([stage, str(file)])


def card(run: Path) -> Row:
    return json.loads((run / "card.json").read_text(encoding="utf-8"))


def question(name: str, **values: Any) -> Row:
    """A line of questions.jsonl, whose question is `name` unless given."""
    return {"id": name, "question": name, "answer": "1", "source": "s", "domain": None, "metadata": {}, **values}


def trace(name: str, **values: Any) -> Row:
    """A line of traces.jsonl."""
    common = {"id": name, "status": "done", "reason": None, "trace": "Let me think.", "answer": "It is 1."}
    return {**common, "prompt_tokens": 5, "completion_tokens": 9, "cost": 0.0, **values}


def filtered(name: str, words: int, **values: Any) -> Row:
    """A line of filtered.jsonl, whose trace has so many words."""
    return {**question(name), "trace": "a " * words, "attempt": "It is 1.", "teacher": "wrong", **values}
