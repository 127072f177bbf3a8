"""Ports for running processes, and waiting for what they do."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


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


def start_hosts(
    words: Sequence[str], count: int, *, copies: bool, devices: int = 1, own: Sequence[str] = ()
) -> list["subprocess.Popen[str]"]:
    """Start a command in so many processes, each with its own devices, that have copies of a model or one together.

    `own` has a last word for each process, if they are not to have the same.
    """
    way = ["mesh.copies=hosts"] if copies else [f"mesh.coordinator=127.0.0.1:{free_port()}"]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return [
        subprocess.Popen(
            [*words, *way, f"mesh.num_processes={count}", f"mesh.process_id={index}", *own[index : index + 1]],
            cwd=Path(__file__).parents[1],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(count)
    ]


def finish(processes: Sequence["subprocess.Popen[str]"], seconds: float = 400) -> list[tuple[str, str]]:
    """Output and error output of each process, all of which must end well."""
    outputs = [process.communicate(timeout=seconds) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs
