"""What happens to a run happens here to real processes: kills, damage, a second run, another mesh."""

import json
import signal
from pathlib import Path

import pytest

from tests.training.conftest import Command, largest_file, metrics, run, start, wait_for_step


def assert_same_end(output: Path, undisturbed: Path) -> None:
    assert metrics(output) == metrics(undisturbed)
    weights = "model/model.safetensors"
    assert (output / weights).read_bytes() == (undisturbed / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 5])
def test_killed_at_any_moment_the_same_command_ends_bit_identically(
    step: int, command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start(command(output))
    wait_for_step(output, [process], step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    status, text = run(command(output))
    assert status == 0, text
    assert_same_end(output, undisturbed)


@pytest.mark.slow
def test_sigterm_saves_says_how_to_go_on_and_exits_143(command: Command, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(command(output, "checkpoint.every_steps=100"))
    wait_for_step(output, [process], 1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate()
    assert process.returncode == 143, text
    assert "the same command goes on from there" in text
    status, text = run(command(output, "checkpoint.every_steps=100"))
    assert status == 0, text
    assert "going on from the checkpoint of step" in text
    assert_same_end(output, undisturbed)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert run(command(output))[0] == 0
    # As if the run had been killed before its export.
    (output / "model").rename(output / "model-before")
    arrays = largest_file(output / "checkpoints" / "4")
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    status, text = run(command(output))
    assert status == 0, text
    assert "checkpoint 4 is damaged" in text
    assert "going on from the checkpoint of step 2" in text
    assert (output / "damaged-checkpoints" / "4").is_dir()
    weights = "model.safetensors"
    assert (output / "model" / weights).read_bytes() == (output / "model-before" / weights).read_bytes()


@pytest.mark.slow
def test_a_second_run_and_a_changed_configuration_are_refused(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(command(output))
    wait_for_step(output, [process], 1)
    process.send_signal(signal.SIGSTOP)  # It lives, but will not be done before the second has looked.
    status, text = run(command(output))
    assert status == 1
    assert "another run is writing here" in text
    process.send_signal(signal.SIGKILL)
    process.communicate()
    status, text = run(command(output, "training.seed=7", "checkpoint.keep=5"))
    assert status == 1
    assert "training.seed: 0 -> 7" in text
    assert "checkpoint.keep: 2 -> 5" in text
    assert "training.seed changed, which would change the training" in text
    assert run(command(output, "checkpoint.keep=5"))[0] == 0
    status, text = run(command(output, "checkpoint.keep=5"))
    assert status == 0
    assert "this run is finished" in text


@pytest.mark.slow
def test_restored_onto_another_mesh_the_losses_are_the_same(
    command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start(command(output))
    wait_for_step(output, [process], 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    status, text = run(command(output, "mesh.fsdp=8", "mesh.tensor=2"), devices=16)
    assert status == 0, text
    resumed, expected = metrics(output), metrics(undisturbed)
    assert resumed[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert [row["step"] for row in resumed] == [row["step"] for row in expected]
    for ours, theirs in zip(resumed, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["trained_tokens"] == theirs["trained_tokens"]
