"""A sample of `tests.kills`: runs on buckets that are killed again and again end as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kills", "scheme"), [("train", 1, "s3"), ("generate", 2, "gs")])
def test_killed_on_a_bucket(mode: str, kills: int, scheme: str) -> None:
    words = [sys.executable, "-m", "tests.kills", mode, scheme, str(kills)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{mode} on {scheme}://: {kills} kills in " in process.stdout
    assert "nothing lost or doubled" in process.stdout
