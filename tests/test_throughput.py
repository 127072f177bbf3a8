"""The comparison with peers, run as its users run it, with the suite that needs no model of theirs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULE = [sys.executable, "-m", "benchmarks.throughput"]


@pytest.mark.slow
def test_a_suite_is_measured_and_reported(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the peer runs on torch, which is a test dependency on Python 3.11 only")
    questions = tmp_path / "questions.jsonl"
    lines = [
        json.dumps({"question": f"Anna has {i} apples and buys {i + 3} more. How many are there?"}) for i in range(200)
    ]
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [
        "small",
        str(tmp_path),
        "--questions",
        str(questions),
        "--output",
        str(tmp_path / "speed"),
        "--rounds",
        "2",
    ]
    run = subprocess.run([*MODULE, *words], cwd=ROOT, check=True, capture_output=True, text=True)
    (comparison,) = json.loads((tmp_path / "speed" / "small.json").read_text())["comparisons"]
    assert comparison["case"] in run.stdout
    seconds = comparison["seconds"]
    assert {name: len(times) for name, times in seconds.items()} == {"s1jax": 2, "transformers": 2}
    assert all(0 < time < 10 for times in seconds.values() for time in times)
    # Both decode the same weights greedily.
    assert comparison["notes"]["rows with the same tokens"] == {"transformers": "1 of 1"}

    page = tmp_path / "speed.md"
    page.write_text("Kept.\n<!-- written by python -m benchmarks.throughput report -->\nReplaced.\n", encoding="utf-8")
    subprocess.run([*MODULE, "report", str(tmp_path / "speed"), str(page)], cwd=ROOT, check=True)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Kept.\n")
    assert "Replaced" not in text
    assert comparison["case"] in text
    assert page.with_suffix(".png").stat().st_size > 1000
