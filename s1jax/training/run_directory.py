"""The output directory of a run: who may write to it, and whether a run may go on in it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax

from s1jax.config_reader import to_dict
from s1jax.locks import exclusive_directory
from s1jax.paths import AnyPath, write_whole
from s1jax.strict_json import parse_json
from s1jax.training.config import TrainConfig


class RunError(RuntimeError):
    """A run that cannot start or go on here; the message says why and what to do."""


_HARMLESS = (
    "mesh.",
    "checkpoint.",
    "logging.",
    "plan.",
    "model.attention",
    "model.remat",
    "training.force",
    "training.output_dir",
)
"""Keys that may change on resume: the same steps are taken with other hardware, or reported elsewhere."""


@contextmanager
def exclusive(directory: AnyPath) -> Iterator[None]:
    """Hold the directory against a second run, until the process ends, however it ends.

    Raises InUseError if another run holds it.
    """
    with exclusive_directory(directory) if jax.process_index() == 0 else nullcontext():
        yield


def check_config(directory: AnyPath, config: TrainConfig, fingerprint: str) -> None:
    """Compare with the configuration (and the data's fingerprint) that the directory's run was started with; save it.

    Differences are printed. Raises RunError if one changes the training and `training.force` is not set.
    """
    path = directory / "config.json"
    current = {**settings(config), "data fingerprint": fingerprint}
    if path.is_file():
        started = _started_with(path)
        changed = [key for key in sorted({*started, *current}) if started.get(key) != current.get(key)]
        for key in changed:
            before, now = (f"{values.get(key)!s:.200}" for values in (started, current))
            print(f"changed since the run was started: {key:.100}: {before} -> {now}", flush=True)
        harmful = [key for key in changed if not key.startswith(_HARMLESS)]
        if harmful and not config.training.force:
            raise RunError(
                f"{directory}: {', '.join(harmful):.500} changed, which would change the training: "
                "undo that, use another training.output_dir, or set training.force=true to go on all the same"
            )
    if jax.process_index() == 0:
        write_whole(path, json.dumps(current, indent=2) + "\n")


def _started_with(path: AnyPath) -> dict[str, Any]:
    try:
        started = parse_json(path.read_bytes(), allow_nan=True)
    except ValueError as error:
        raise RunError(f"{path}: {error}: use another training.output_dir") from None
    if not isinstance(started, dict):
        raise RunError(f"{path}: expected an object, found {started!r:.40}: use another training.output_dir")
    return started


def settings(config: TrainConfig) -> dict[str, Any]:
    """Every key of a configuration under its dotted name."""
    return _flat(to_dict(config))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
