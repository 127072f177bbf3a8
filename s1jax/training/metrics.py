"""Where the numbers of a run go: always metrics.jsonl and a line of progress, and trackers if configured."""

import json
import secrets
import tempfile
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from s1jax.config_reader import ConfigError
from s1jax.jsonl import RowWriter, merge_parts, replace_rows, written_rows
from s1jax.paths import AnyPath, BucketPath, write_whole
from s1jax.progress import progress
from s1jax.training.config import LoggingSection


@runtime_checkable
class Tracker(Protocol):
    """Something that takes a step's numbers."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Record the numbers of a step."""

    def flush(self) -> None:
        """Write what is still held back, as far as a run that goes on from here must find it."""

    def close(self) -> None:
        """Write what is still held back."""


class MetricsFile:
    """metrics.jsonl, one line a step; on resume the lines after the restored step are taken back."""

    def __init__(self, path: AnyPath, first_step: int):
        """Keep the lines of an earlier run up to `first_step`."""
        kept = {row["step"]: row for row in written_rows(path, step=int) if row["step"] <= first_step}
        replace_rows(path, kept.values())
        self._path, self._writer = path, RowWriter(path)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Append a line, as `RowWriter` does."""
        self._writer.append([{"step": step, **numbers}])

    def flush(self) -> None:
        """Write what is held back for a bucket."""
        self._writer.flush()

    def close(self) -> None:
        """Make one file of it."""
        self._writer.close()
        merge_parts(self._path, key=lambda row: row["step"], order=lambda row: row["step"])


class LiveLine:
    """How far the run is, with the numbers of the last step and the time left."""

    def __init__(self, first_step: int, total_steps: int):
        """Show progress from `first_step` to `total_steps`."""
        self._bar = progress("step", total_steps, initial=first_step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Redraw the line, or write one where it is time."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)
        self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()


class TensorBoard:
    """TensorBoard event files."""

    def __init__(self, directory: AnyPath, first_step: int):
        """Write to `directory`; TensorBoard hides what an earlier run wrote after `first_step`."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step + 1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Add one scalar for each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run that goes on under the same id after a restart."""

    def __init__(self, project: str, directory: AnyPath, config: dict[str, Any]):
        """Start or continue the run whose id is kept in `directory`; wandb's own files go there too, if it is local."""
        import wandb

        id_file = directory / "wandb_id"
        if not id_file.exists():
            write_whole(id_file, secrets.token_hex(8))
        local = tempfile.mkdtemp(prefix="wandb-") if isinstance(directory, BucketPath) else directory
        self._run = wandb.init(
            project=project, id=id_file.read_text(encoding="utf-8"), resume="allow", dir=local, config=config
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers."""
        self._run.log(numbers, step=step)

    def flush(self) -> None:
        """The library sends in its own time."""

    def close(self) -> None:
        """Send what is held back and end the run."""
        self._run.finish()


def check_trackers(section: LoggingSection, directory: AnyPath) -> None:
    """Raise ModuleNotFoundError, saying what to install, if a tracker's package is not there.

    Raises ConfigError if one cannot write to a bucket.
    """
    if section.tensorboard and isinstance(directory, BucketPath):
        raise ConfigError(
            f"logging.tensorboard: event files are not written to {directory}: metrics.jsonl and "
            "logging.wandb_project are; or choose a local training.output_dir"
        )
    wanted = {"tensorboardX": section.tensorboard, "wandb": section.wandb_project}
    missing = [package for package, setting in wanted.items() if setting and find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"{' and '.join(missing)} not installed: pip install '.[trackers]'")


def open_trackers(
    section: LoggingSection, directory: AnyPath, config: dict[str, Any], first_step: int, total_steps: int
) -> list[Tracker]:
    """The trackers of a run that goes on after `first_step`."""
    trackers: list[Tracker] = [MetricsFile(directory / "metrics.jsonl", first_step), LiveLine(first_step, total_steps)]
    if section.tensorboard:
        trackers.append(TensorBoard(directory / "tensorboard", first_step))
    if section.wandb_project:
        trackers.append(WeightsAndBiases(section.wandb_project, directory, config))
    return trackers


def save_provenance(path: AnyPath, config: dict[str, Any], versions: dict[str, str]) -> None:
    """Write down what the run was made with."""
    write_whole(path, json.dumps({"config": config, "versions": versions}, indent=2) + "\n")
