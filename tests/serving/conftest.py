"""A real server of a tiny model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.server import Server, running


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_directory(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    words = ["server.max_waiting=1200", "server.max_connections=1200", "budget.max_answer_tokens=24"]
    with running(model, tmp_path_factory.mktemp("server") / "log", words) as server:
        yield server
