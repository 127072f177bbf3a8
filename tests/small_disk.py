"""A disk of a few pages, to be filled."""

import gc
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """A tmpfs of this size, mounted at a new directory; skips the test where that needs rights it has not."""
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield directory
    finally:
        # A file that only a caught error's traceback still holds keeps the disk busy.
        gc.collect()
        subprocess.run(["umount", directory], check=True)
