"""Real processes on loopback find each other in every launcher's environment, and agree or say who differs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.test_launchers import V5P, machine

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, os, sys
from pathlib import Path
root, words, body = sys.argv[1:]
import jax
from s1jax.config import DecodingMeshSection
from s1jax.processes import *
environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
own = start_processes(DecodingMeshSection(**json.loads(words)), environment, Path(root))
exec(body)
"""
SHOW = """
print(json.dumps([own.index, own.count, jax.process_index(), jax.process_count(), jax.device_count()]), flush=True)
"""


def run_all(
    environments: Sequence[dict[str, str]],
    body: str,
    root: Path,
    sections: Sequence[dict[str, object]] | None = None,
    directories: Sequence[Path] | None = None,
) -> list[tuple[int, str]]:
    """Exit status and output of one process for each environment, all at once."""
    processes = []
    for number, environment in enumerate(environments):
        section = sections[number] if sections else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(root), json.dumps(section), body],
                cwd=directories[number] if directories else ROOT,
                env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **environment},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    results = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        own = "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))
        results.append((process.returncode, own + err))
    return results


def slurm(number: int, count: int, port: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{count})",
        "SLURM_NODEID": str(number),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


def open_mpi(number: int, count: int, port: int) -> dict[str, str]:
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "JAX_COORDINATOR_PORT": str(port),
    }


def gke_tpu(number: int, count: int, port: int) -> dict[str, str]:
    hosts = ",".join(["localhost"] * count)
    return {"TPU_WORKER_HOSTNAMES": hosts, "TPU_WORKER_ID": str(number), "JAX_COORDINATOR_PORT": str(port)}


def xpk(number: int, count: int, port: int) -> dict[str, str]:
    address = {"JAX_COORDINATOR_ADDRESS": "localhost", "JAX_COORDINATOR_PORT": str(port)}
    return {**address, "NNODES": str(count), "NODE_RANK": str(number)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "count"), [(slurm, 2), (open_mpi, 2), (gke_tpu, 4), (xpk, 2)], ids=["SLURM", "Open MPI", "TPU", "xpk"]
)
def test_processes_find_each_other(launcher, count: int, tmp_path: Path) -> None:
    root = machine(tmp_path, pci=V5P if launcher is gke_tpu else ())
    port = free_port()
    results = run_all([launcher(i, count, port) for i in range(count)], SHOW, root)
    for number, (status, text) in enumerate(results):
        assert status == 0, text
        assert json.loads(text.splitlines()[0]) == [number, count, number, count, count]
        assert f"process {number} of {count} (" in text
        assert f"1 of {count} devices" in text


@pytest.mark.slow
def test_what_processes_agree_on(tmp_path: Path) -> None:
    body = """
long = bytes(range(256)) * 40
print(broadcast(long if own.index == 0 else b"") == long, broadcast(b"") == b"")
print(agree_any(own.index == 1), agree_all(own.index == 1))
same_everywhere({"a": "1", "b": "2"})
see_same_directory(Path(os.environ["SHARED"]))
agree_all(True)
print(sorted(p.name for p in Path(os.environ["SHARED"]).iterdir()))
for facts in ({"a": "1", "data": str(own.index)}, {"a": "1"} if own.index else {"b": "1"}):
    try:
        same_everywhere(facts)
    except ProcessError as error:
        print(error)
def action():
    if own.index:
        raise OSError("no such file here")
try:
    together(action)
except (OSError, ProcessError) as error:
    print(error, flush=True)
"""
    shared = tmp_path / "shared"
    shared.mkdir()
    port = free_port()
    results = run_all([{**slurm(i, 2, port), "SHARED": str(shared)} for i in range(2)], body, tmp_path)
    for number, (status, text) in enumerate(results):
        assert status == 0, text
        failure = "no such file here" if number else "another process could not start; its own message says why"
        assert text.splitlines()[:3] == ["True True", "True False", "[]"]
        assert "data: process 1 has another value than the first process" in text
        assert "process 1 has another version of s1jax than the first process" in text
        assert failure in text


@pytest.mark.slow
def test_hosts_without_a_common_file_system_are_told_so(tmp_path: Path) -> None:
    directories = [tmp_path / name for name in ("one", "two")]
    for directory in directories:
        directory.mkdir()
    body = """
try:
    see_same_directory(Path("run"))
except ProcessError as error:
    print(error, flush=True)
"""
    port = free_port()
    started = time.monotonic()
    results = run_all([slurm(i, 2, port) for i in range(2)], body, tmp_path, directories=directories)
    for status, text in results:
        assert status == 0, text
        assert "run: process 1 has another directory than the first process" in text
    assert time.monotonic() - started < 120


def test_what_cannot_be_a_run_is_refused(tmp_path: Path) -> None:
    sections: list[dict[str, object]] = [
        {"coordinator": "127.0.0.1:1"},
        {"num_processes": 2},
        {"num_processes": 2, "process_id": 2},
        {"num_processes": 2, "process_id": 0},
    ]
    said = ["mesh.num_processes and mesh.process_id must be given too", "given together", "from 0", "mesh.coordinator"]
    for (status, text), words in zip(run_all([{}] * 4, SHOW, tmp_path, sections), said, strict=True):
        assert status == 1
        assert words in text.splitlines()[-1]


def test_processes_with_a_copy_each_do_not_look_for_each_other(tmp_path: Path) -> None:
    sections: list[dict[str, object]] = [{"copies": "hosts", "num_processes": 2, "process_id": i} for i in range(2)]
    for number, (status, text) in enumerate(run_all([{}] * 2, SHOW, tmp_path, sections)):
        assert status == 0, text
        assert json.loads(text.splitlines()[0]) == [number, 2, 0, 1, 1]
