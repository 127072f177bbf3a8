"""Compiled programs kept on disk between runs."""

import contextlib
import hashlib
import os
import platform
import time
import zlib
from pathlib import Path

import jax

_CHECKED = ".checked"
"""Its time is that of the last check."""


def keep_compilations() -> None:
    """Use jax's persistent compilation cache: JAX_COMPILATION_CACHE_DIR if set, else a directory of this user's."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = for_this_processor(user_cache())
        remove_broken(directory)
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # The small programs too: a dozen of them cost a second of a start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def user_cache() -> Path:
    """The directory of this user's compiled programs."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "s1jax" / "compiled"


def for_this_processor(directory: Path) -> Path:
    """The part of a directory for processors like this one.

    What XLA compiled for another kind it refuses each time, with lines of errors, and never writes anew: of computers
    with a common home directory some would always compile.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return directory / hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:8]


def remove_broken(directory: Path) -> None:
    """Remove programs that a process which was killed, or a full disk, left unfinished, since the last call.

    jax writes them in place, says at each start that it cannot read them, and never writes them anew.
    """
    checked, now = directory / _CHECKED, time.time()
    since = checked.stat().st_mtime if checked.exists() else 0
    for entry in directory.glob("*-cache"):
        # Another process may do the same now.
        with contextlib.suppress(FileNotFoundError):
            # Clocks of file systems are not as fine as others.
            if entry.stat().st_mtime >= since - 2 and not _is_whole(entry.read_bytes()):
                entry.unlink()
    # Where nothing may be written, jax says so itself.
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        checked.touch()
        os.utime(checked, (now, now))


def _is_whole(program: bytes) -> bool:
    """Whether nothing is missing of what zlib wrote; with Python 3.14, jax takes another format."""
    if program and program[0] != 0x78:
        return True
    try:
        zlib.decompress(program)
    except zlib.error:
        return False
    return True
