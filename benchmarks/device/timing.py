"""Seconds of compiled programs, and what of a device's time goes where."""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

PARTS = {
    "attention": ("fmha", "flash", "sdpa", "cudnn", "splash"),
    "products": ("gemm", "dot", "cublas", "cutlass", "nvjet", "matmul", "xmma", "wgmma"),
}
"""Parts of the names of kernels, by what they do; whatever has none of them is "the rest"."""


def seconds_of(run: Callable[[], Any], repeats: int = 5) -> float:
    """The median of some runs, after one that is not counted."""
    jax.block_until_ready(run())
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def shares_of_time(run: Callable[[], Any]) -> dict[str, float]:
    """Of the time that a GPU computes during one run, the share of each part; empty where the profiler shows none."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        spent: Counter[str] = Counter()
        for file in Path(directory).rglob("*.xplane.pb"):
            for plane in ProfileData.from_file(str(file)).planes:
                if not plane.name.startswith("/device:GPU"):
                    continue
                for line in plane.lines:
                    if "Compute" in line.name:
                        for event in line.events:
                            spent[_part(event.name)] += int(event.duration_ns)
    total = sum(spent.values())
    return {part: spent[part] / total for part in (*PARTS, "the rest")} if total else {}


def _part(kernel: str) -> str:
    name = kernel.lower()
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "the rest")
