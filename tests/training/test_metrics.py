"""metrics.jsonl and the trackers, on a disk and in a bucket."""

from pathlib import Path

import pytest

from s1jax.config_reader import ConfigError
from s1jax.jsonl import RowWriter, written_rows
from s1jax.paths import AnyPath, BucketPath
from s1jax.training.config import LoggingSection
from s1jax.training.metrics import MetricsFile, check_trackers, open_trackers


def steps(path: AnyPath) -> list[int]:
    return [row["step"] for row in written_rows(path)]


def test_steps_after_the_restored_one_are_taken_back(root: AnyPath) -> None:
    path = root / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in range(1, 6):
        metrics.log(step, {"loss": 1 / step})
    metrics.close()
    assert path.read_text(encoding="utf-8").splitlines()[2] == '{"step": 3, "loss": 0.3333333333333333}'
    # A run that was killed: its last steps are in parts, or cut.
    with RowWriter(path) as writer:
        writer.append([{"step": 6, "loss": 0.0}])
    metrics = MetricsFile(path, 3)
    assert steps(path) == [1, 2, 3]
    metrics.log(4, {"loss": 0.5})
    metrics.close()
    assert path.read_text(encoding="utf-8").splitlines()[3] == '{"step": 4, "loss": 0.5}'
    assert sorted(entry.name for entry in root.iterdir()) == ["metrics.jsonl"]


def test_event_files_are_for_disks(bucket: BucketPath, tmp_path: Path) -> None:
    section = LoggingSection(tensorboard=True)
    check_trackers(section, tmp_path)
    with pytest.raises(ConfigError, match=f"^logging.tensorboard: event files are not written to {bucket}: ") as error:
        check_trackers(section, bucket)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_weights_and_biases_keeps_one_run_for_a_bucket(
    bucket: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for _ in range(2):
        trackers = open_trackers(LoggingSection(wandb_project="s1jax-test"), bucket, {}, 0, 1)
        for tracker in trackers:
            tracker.log(1, {"loss": 1.0})
            tracker.close()
    run_id = (bucket / "wandb_id").read_text()
    assert len(list(tmp_path.glob(f"wandb-*/wandb/offline-run-*-{run_id}"))) == 2
