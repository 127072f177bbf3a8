"""Ports for running processes, and waiting for what they do."""

import socket
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


def free_port() -> int:
    """A port of loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
