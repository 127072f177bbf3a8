"""Damaged files of every kind are accepted, or refused in words: a few of each here, more in `benchmarks.fuzz`."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fuzz_files import KINDS

ROOT = Path(__file__).parents[1]


def fuzz(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_sample_of_damaged_files() -> None:
    result = fuzz("--cases", str(10 * len(KINDS)), "--seed", "20")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
    *_, total = result.stdout.splitlines()
    name, cases, accepted, refused, *bad = total.split()
    assert (name, int(cases)) == ("all", 10 * len(KINDS))
    assert int(refused) > int(accepted) > 10
    assert set(bad) == {"0"}
