"""What a run finds when it is started again: broken files, other data, another mesh, kills at the worst moments."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from s1jax.config_reader import load_config
from s1jax.training.checkpoint import DamagedCheckpointsError
from s1jax.training.config import TrainConfig
from s1jax.training.loop import train
from s1jax.training.run_directory import RunError
from tests.processes import wait_until
from tests.tiny import QWEN2, model_directory
from tests.training.conftest import Command, largest_file, metrics, run, start

WEIGHTS = "model/model.safetensors"


def unfinished(undisturbed: Path, output: Path) -> Path:
    """A run as it is when it is killed after its last checkpoint and before its export."""
    shutil.copytree(undisturbed, output, ignore=shutil.ignore_patterns("model"))
    return output


def config(command: Command, output: Path, *more: str) -> TrainConfig:
    return load_config(TrainConfig, command(output, *more)[2:])


def writing_a_checkpoint(output: Path) -> bool:
    return any("tmp" in path.name for path in (output / "checkpoints").glob("4*"))


def having_written_a_checkpoint(output: Path) -> bool:
    return (output / "checkpoints" / "4").is_dir()


def exporting(output: Path) -> bool:
    return (output / ".model.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", [writing_a_checkpoint, having_written_a_checkpoint, exporting])
def test_killed_while_it_writes(
    moment: Callable[[Path], bool], command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start(command(output))
    wait_until(lambda: moment(output), [process], seconds=0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "model").exists()
    status, text = run(command(output))
    assert status == 0, text
    assert metrics(output) == metrics(undisturbed)
    assert (output / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "said"),
    [(truncate, "has changed"), (garbage, "has changed"), (Path.unlink, "is gone")],
    ids=["truncated", "zeroed", "deleted"],
)
def test_a_damaged_checkpoint_is_named_and_set_aside(
    damage: Callable[[Path], None],
    said: str,
    command: Command,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = unfinished(undisturbed, tmp_path / "run")
    damage(largest_file(output / "checkpoints" / "4"))
    assert train(config(command, output)) == 0
    printed = capsys.readouterr().out
    assert "checkpoint 4 is damaged" in printed
    assert said in printed
    assert "going on from the checkpoint of step 2" in printed
    assert (output / "damaged-checkpoints" / "4").is_dir()
    for ours, theirs in zip(metrics(output), metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_when_all_checkpoints_are_damaged_nothing_is_trained(
    command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    output = unfinished(undisturbed, tmp_path / "run")
    for step in ("2", "4"):
        truncate(largest_file(output / "checkpoints" / step))
    with pytest.raises(DamagedCheckpointsError, match=r"start again with another training\.output_dir"):
        train(config(command, output))
    assert sorted(path.name for path in (output / "damaged-checkpoints").iterdir()) == ["2", "4"]
    assert not (output / "model").exists()


def test_the_newest_checkpoints_are_kept(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train(config(command, output, "checkpoint.every_steps=1")) == 0
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["4", "5"]


@pytest.mark.slow
def test_from_sixteen_shards_to_eight_by_two(command: Command, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(command(output, "mesh.fsdp=16"), devices=16)
    wait_until((output / "checkpoints" / "2").is_dir, [process])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    status, text = run(command(output, "mesh.fsdp=8", "mesh.tensor=2"), devices=16)
    assert status == 0, text
    assert "going on from the checkpoint of step" in text
    for ours, theirs in zip(metrics(output), metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["trained_tokens"] == theirs["trained_tokens"]


def test_other_content_of_the_data_file_is_refused_unless_forced(
    command: Command, traces: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = unfinished(undisturbed, tmp_path / "run")
    shutil.rmtree(output / "checkpoints" / "4")
    before = traces.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    rows[3]["attempt"] = rows[3]["attempt"][::-1]  # As many tokens, but others.
    try:
        traces.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(RunError, match="data fingerprint changed, which would change the training"):
            train(config(command, output))
        assert train(config(command, output, "training.force=true")) == 0
    finally:
        traces.write_text(before)
    assert "changed since the run was started: data fingerprint" in capsys.readouterr().out


def test_a_bad_row_ends_train_py_before_it_starts(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a", "thinking_trajectories": ["b"], "attempt": ""}\nnot json\n')
    status, text = run(command(tmp_path / "run", f"data.path={path}"))
    assert status == 1
    assert "bad.jsonl: 2 problems" in text
    assert "line 1: field 'attempt'" in text
    assert "line 2: not JSON" in text
    assert "Traceback" not in text


def test_a_tokenizer_with_more_ids_than_the_model_ends_it_before_it_starts(command: Command, tmp_path: Path) -> None:
    small = model_directory(tmp_path / "small", {**QWEN2, "vocab_size": 360})
    with pytest.raises(ValueError, match=f"the tokenizer of {small} has ids up to 367, the model's vocabulary only 36"):
        train(config(command, tmp_path / "run", f"model.path={small}"))


def test_a_tracker_that_is_not_installed_names_the_extra(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    for word in ("logging.wandb_project=x", "logging.tensorboard=true"):
        with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[trackers\]'"):
            train(config(command, tmp_path / "run", word))
