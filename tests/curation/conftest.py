"""A run directory with questions, and sections with short waits."""

import json
from pathlib import Path
from typing import Any

import pytest

from s1jax.curation.sections import EndpointSection
from tests.curation.server import Server
from tests.decoding.conftest import directory

__all__ = ["directory"]
KEY = "sk-PLANTED/7f3a9c51d2"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def write_questions(directory: Path, names: list[str], **columns: Any) -> Path:
    """questions.jsonl with the questions of these names, which are their ids too."""
    directory.mkdir(parents=True, exist_ok=True)
    common = {"answer": "1", "source": "test", "domain": None, "metadata": {}, **columns}
    rows = [{"id": name, "question": name, **common} for name in names]
    (directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def settings(server: Server, **changes: Any) -> dict[str, Any]:
    """A section for this server, whose waits are short."""
    return {
        "base_url": server.url,
        "model": "teacher",
        "timeout": 20.0,
        "backoff": 0.01,
        "max_backoff": 0.02,
        "max_tokens": 100,
        **changes,
    }


def endpoint(server: Server, **changes: Any) -> EndpointSection:
    return EndpointSection(**settings(server, **changes))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
