"""train.py --plan as a person runs it, with the compilers that `make test` installs beside the environment."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMPILERS = Path(sys.prefix) / "compilers"


def run(*words: str, compilers: bool = True) -> subprocess.CompletedProcess[str]:
    """A plan made by a process of its own; without compilers it finds none to make it with."""
    if compilers and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("XLA's compilers for GPU and TPU are for Linux on x86-64")
    if compilers and not COMPILERS.is_dir():
        pytest.fail(f"{COMPILERS}: not there; `make compilers` installs it, as `make test` does first")
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(COMPILERS) if compilers else ""}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def plan(output: Path, *words: str) -> dict[str, Any]:
    """The plan that a command writes, and what it printed, under `text`."""
    process = run(*words, f"plan.output={output}")
    assert process.returncode == 0, process.stderr
    content = json.loads(output.read_text())
    return {**(content[0] if isinstance(content, list) else content), "text": process.stdout}
