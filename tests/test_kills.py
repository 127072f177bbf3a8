"""A sample of `tests.kills`: runs on buckets that are killed again and again end as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize(("mode", "kills"), [("train", 1), ("generate", 2)])
def test_killed_on_a_bucket(mode: str, kills: int, scheme: str) -> None:
    words = [sys.executable, "-m", "tests.kills", mode, scheme, str(kills)]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{mode} on {scheme}://: {kills} kills in " in process.stdout
    assert "nothing lost or doubled" in process.stdout
