"""The kernels' tests again, with vectors narrower than this processor's: what others have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from s1jax.model import cpu_kernel

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("width", cpu_kernel.NARROWER)
def test_the_kernels_compute_the_same_in_narrower_vectors(width: str) -> None:
    names = ("projection", "quantisation", "cpu_training")
    tests = [f"tests/model/test_{name}.py" for name in names]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-k",
            "not compile and not a_model and not mesh and not adapter",
            *tests,
        ],
        cwd=ROOT,
        env={**os.environ, "S1JAX_CPU_VECTOR_BYTES": width},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:]


def test_a_width_is_said_and_one_that_no_processor_has_is_refused() -> None:
    program = "from s1jax.model import cpu_kernel; print(cpu_kernel.vector_bytes())"
    runs = {
        width: subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "S1JAX_CPU_VECTOR_BYTES": width},
            capture_output=True,
            text=True,
        )
        for width in ("16", "24")
    }
    assert runs["16"].stdout.strip() == "16"
    assert "S1JAX_CPU_VECTOR_BYTES=24" in runs["24"].stderr
