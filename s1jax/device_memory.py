"""How much of a GPU's memory jax may take, what becomes of a CPU's between steps, and how much there ever was."""

import ctypes
import os
import resource
import sys
from typing import Any

GIB = 2**30
GPU_MEMORY_FRACTION = 0.94
"""The rest, about 5 GiB of an H100, is for the driver, CUDA libraries and NCCL."""


def use_most_of_memory() -> None:
    """Let jax take that much, of which its own default is three quarters; before jax is imported. Only GPUs heed it.

    And for what a step moves off the GPUs, what it needs of the host's memory, up to nine tenths; its own default is
    64 GiB. XLA_PYTHON_CLIENT_MEM_FRACTION and XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB in the environment win.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(int(0.9 * host / GIB)))


_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next, instead of giving it back to the system.

    A step on a CPU frees some hundred megabytes that the next one asks for; page by page, they cost a tenth of its
    time. Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(parameter, value)


def peak_resident_bytes() -> int:
    """The most memory, in bytes, that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def limit_bytes(device: Any) -> int | None:
    """Bytes that jax may take of a device's memory; None where it does not say, as of a CPU's."""
    return (device.memory_stats() or {}).get("bytes_limit")


def free_bytes(device: Any) -> int:
    """Bytes of a device's memory that are not in use; of a CPU's, those that the system could give, shared equally."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
    try:
        with open("/proc/meminfo") as lines:
            available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return available // len(device.client.local_devices())
