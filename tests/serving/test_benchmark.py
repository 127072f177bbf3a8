"""The load that servers are compared under, of this project's alone."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT


@pytest.mark.slow
def test_a_load_is_measured_and_every_budget_kept(model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"What is {i} + 4?"}) + "\n" for i in range(6)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(model), "--questions", str(questions), "--output", str(tmp_path / "out"), "--port", str(port)]
    words += ["--count", "5", "--rates", "20", "40", "--budget", "8", "--answer", "8"]
    command = [sys.executable, "-m", "benchmarks.serving", *words, "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out/serving.json").read_text())["measurements"]
    assert [(m["rate"], m["answers"], m["budgets_kept"]) for m in measured] == [(20.0, 5, 5), (40.0, 5, 5)]
    for m in measured:
        assert m["tokens_per_second"] > 0
        assert 0 < m["first_token_seconds"]["p50"] <= m["first_token_seconds"]["p99"]
    assert (tmp_path / "out/serving.png").read_bytes().startswith(b"\x89PNG")
