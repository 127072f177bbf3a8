"""Two processes of eight devices against one of sixteen, and what happens when one of the two goes."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes import free_port
from tests.training.conftest import Command, metrics, run, start, wait_for_step

MESH = ["mesh.fsdp=8", "mesh.tensor=2", "training.num_epochs=4", "checkpoint.every_steps=4"]


def start_both(command: Command, output: Path, *more: str) -> list["subprocess.Popen[str]"]:
    meeting = [f"mesh.coordinator=127.0.0.1:{free_port()}", "mesh.num_processes=2"]
    return [start(command(output, *MESH, *meeting, f"mesh.process_id={i}", *more), devices=8) for i in range(2)]


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(command: Command, tmp_path: Path) -> None:
    status, text = run(command(tmp_path / "one", *MESH), devices=16)
    assert status == 0, text
    processes = start_both(command, tmp_path / "two")
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == 12
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    exported = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
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
