"""decode.py serve as a person runs it, on loopback."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
QUESTION: Any = [{"role": "user", "content": "How many apples does she have?"}]


@dataclass
class Server:
    process: "subprocess.Popen[str]"
    url: str
    log: Path

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)


def memory(server: Server) -> int:
    """What a server's process has in memory, in KiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found
    return int(found[1])


@contextmanager
def running(model: Path, log: Path, words: Sequence[str] = (), **environment: str) -> Iterator[Server]:
    """`decode.py serve` at a port of its own, until the block is left."""
    command = [sys.executable, "decode.py", "serve", f"model.path={model}", "model.dtype=float32", "server.port=0"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "batch_size=4", *words],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": "", **environment},
            stderr=errors,
            text=True,
        )
    try:
        while not (found := re.search(r"at (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        yield Server(process, found[1], log)
    finally:
        process.kill()
        process.wait()
