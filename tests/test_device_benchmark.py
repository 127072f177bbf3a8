"""`python -m benchmarks.device` at toy sizes: all of its parts, and its verdicts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_part_runs_and_holds_on_a_cpu(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.device", "--smoke", "--output", str(tmp_path)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((tmp_path / "device.json").read_text(encoding="utf-8"))
    assert all(verdict["passed"] for verdict in report["verdicts"])
    assert report["left_out"] == []
    rows = {title: len(table) for title, table in report["tables"].items()}
    assert rows == {"Attention kernels": 3, "A small model": 3, "Training": 2, "Decoding": 2}
    assert "| claim | holds | found |" in (tmp_path / "device.md").read_text(encoding="utf-8")


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.device", "--smoke", "--minutes", "0", "--output", str(tmp_path)]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "device.json").read_text(encoding="utf-8"))
    assert report["tables"] == {}
    assert len(report["left_out"]) == 10
    assert "Left out: Attention kernels: toy, packed (no time was left)" in (tmp_path / "device.md").read_text()
