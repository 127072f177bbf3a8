"""Waiting for what a running process does."""

import subprocess
import time
from collections.abc import Callable, Sequence


def wait_until(
    condition: Callable[[], bool], processes: Sequence["subprocess.Popen[str]"], seconds: float = 0.005
) -> None:
    """Look every so often whether the condition holds, and that all processes still live."""
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(seconds)
