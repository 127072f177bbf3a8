"""A tiny model and a handful of traces, and train.py as a person runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from s1jax.paths import AnyPath
from tests.processes import wait_until
from tests.tiny import model_directory

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("train") / "model")


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    rows = [
        {
            "question": f"What is {i} + {i + 3}?",
            "thinking_trajectories": [f"I add {i} and {i + 3}. " * (1 + i % 3) + "Wait, let me check this."],
            "attempt": str(2 * i + 3),
        }
        for i in range(10, 22)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Command = Callable[..., list[str]]


@pytest.fixture(scope="session")
def command(model: Path, traces: Path) -> Command:
    """The command line of a run of 6 steps in a given output directory."""

    def words(output: AnyPath, *more: str) -> list[str]:
        settings = [
            f"model.path={model}",
            "model.dtype=float32",
            f"data.path={traces}",
            "data.block_size=256",
            f"training.output_dir={output}",
            "training.num_epochs=2",
            "training.batch_size=4",
            "training.export_dtype=float32",
            "optimizer.learning_rate=1e-3",
            "checkpoint.every_steps=2",
        ]
        return [sys.executable, "train.py", *settings, *more]

    return words


def start(words: list[str], devices: int = 1, variables: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **(variables or {})}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(words: list[str], devices: int = 1) -> tuple[int, str]:
    """Exit status and output of a whole run."""
    process = start(words, devices)
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def wait_for_step(output: Path, processes: Sequence["subprocess.Popen[str]"], step: int) -> None:
    """Wait until the run has written down so many steps."""
    path = output / "metrics.jsonl"
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= step, processes)


def largest_file(checkpoint: Path) -> Path:
    """The file of a checkpoint that holds most of its arrays."""
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="session")
def undisturbed(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    status, text = run(command(output))
    assert status == 0, text
    return output


def metrics(output: AnyPath) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "mfu")} for row in rows]
