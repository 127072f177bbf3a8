"""Several processes against one, as their launchers start them, and what happens when one of them goes."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes import free_port
from tests.test_launchers import V5P, machine
from tests.test_processes import gke_tpu, slurm
from tests.training.conftest import Command, metrics, run, start, wait_for_step

HOST = "tests.training.faked_host"
MESH = ["mesh.fsdp=8", "mesh.tensor=2", "training.num_epochs=4", "checkpoint.every_steps=4"]


def start_both(command: Command, output: Path, *more: str) -> list["subprocess.Popen[str]"]:
    meeting = [f"mesh.coordinator=127.0.0.1:{free_port()}", "mesh.num_processes=2"]
    return [start(command(output, *MESH, *meeting, f"mesh.process_id={i}", *more), devices=8) for i in range(2)]


@pytest.fixture(scope="module")
def one(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process on sixteen devices."""
    output = tmp_path_factory.mktemp("one") / "run"
    status, text = run(command(output, *MESH), devices=16)
    assert status == 0, text
    return output


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "count"), [(slurm, 2), (gke_tpu, 4)], ids=["SLURM", "TPU"])
def test_several_processes_take_the_same_steps_as_one(
    launcher: Callable[[int, int, int], dict[str, str]], count: int, one: Path, command: Command, tmp_path: Path
) -> None:
    root, port = machine(tmp_path / "machine", pci=V5P if launcher is gke_tpu else ()), free_port()
    words = command(tmp_path / "run", *MESH)[2:]
    processes = [
        start([sys.executable, "-m", HOST, str(root), *words], 16 // count, launcher(number, count, port))
        for number in range(count)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs
    assert f"process 1 of {count} (" in outputs[1]
    one_metrics, several = metrics(one), metrics(tmp_path / "run")
    assert len(one_metrics) == 12
    assert [row["step"] for row in several] == [row["step"] for row in one_metrics]
    for a, b in zip(one_metrics, several, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    exported = [load_file(output / "model" / "model.safetensors") for output in (one, tmp_path / "run")]
    for name, tensor in exported[0].items():
        np.testing.assert_allclose(exported[1][name], tensor, rtol=0, atol=1e-6 + 1e-4 * np.abs(tensor).max())


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_dies_the_other_ends_within_two_minutes(victim: int, command: Command, tmp_path: Path) -> None:
    processes = start_both(command, tmp_path / "run", "training.num_epochs=400")
    wait_for_step(tmp_path / "run", processes, 2)
    processes[victim].send_signal(signal.SIGKILL)
    died = time.monotonic()
    text, _ = processes[1 - victim].communicate(timeout=180)
    processes[victim].communicate()
    assert processes[1 - victim].returncode not in (0, None), text
    assert time.monotonic() - died < 120, text


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(command: Command, tmp_path: Path) -> None:
    processes = start_both(command, tmp_path / "run", "training.num_epochs=400", "checkpoint.every_steps=1000")
    wait_for_step(tmp_path / "run", processes, 2)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert f"saved after step {last}" in outputs[0]
    assert (tmp_path / "run" / "checkpoints" / str(last)).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "seconds"), [(1, 30), (2, 10)])
def test_sigterm_ends_a_process_whose_neighbour_hangs(
    signals: int, seconds: float, command: Command, tmp_path: Path
) -> None:
    processes = start_both(command, tmp_path / "run", "training.num_epochs=400", "checkpoint.every_steps=1000")
    wait_for_step(tmp_path / "run", processes, 2)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(1)  # The other one now waits for it in the middle of a step.
    for _ in range(signals):
        processes[0].send_signal(signal.SIGTERM)
        asked = time.monotonic()
        time.sleep(3 if signals > 1 else 0)
    text, _ = processes[0].communicate(timeout=60)
    assert time.monotonic() - asked < seconds
    assert processes[0].returncode == 143, text
    assert ("a second SIGTERM" if signals > 1 else "nothing has moved for 25 seconds") in text
    processes[1].kill()
    processes[1].communicate()


@pytest.mark.slow
def test_another_configuration_on_one_host_is_said_before_the_weights_are_read(
    command: Command, tmp_path: Path
) -> None:
    meeting = [f"mesh.coordinator=127.0.0.1:{free_port()}", "mesh.num_processes=2"]
    words = [[*meeting, f"mesh.process_id={number}", f"training.seed={number}"] for number in range(2)]
    processes = [start(command(tmp_path / "run", *MESH, *own), devices=8) for own in words]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    for output in outputs:
        assert "error: training.seed: process 1 has another value than the first process" in output
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_host_without_the_data_ends_both_at_once(command: Command, traces: Path, tmp_path: Path) -> None:
    meeting = [f"mesh.coordinator=127.0.0.1:{free_port()}", "mesh.num_processes=2"]
    words = [[*meeting, f"mesh.process_id={number}"] for number in range(2)]
    words[1].append(f"data.path={tmp_path}/none.jsonl")
    processes = [start(command(tmp_path / "run", *MESH, *own), devices=8) for own in words]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    assert "another process could not start" in outputs[0]
    assert "none.jsonl: no such file" in outputs[1]
