"""Checkpoints that are either whole or not there, and that say so when a disk or a store has damaged them.

Orbax keeps the newest ones and has them written in the background, under a temporary name or without its commit file
until all processes have written theirs, the manifests of `checkpoint_files` included.
"""

import logging
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from s1jax.paths import AnyPath, BucketPath, move_tree
from s1jax.processes import agree_any, together
from s1jax.training.checkpoint_files import ITEM, Contents, StateRestore, StateSave, damage
from s1jax.training.config import CheckpointSection
from s1jax.training.step import TrainState

# Every error reaches `SaveError` or is raised; orbax also logs each in each thread that it ends, with its traceback.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are intact."""


class DamagedCheckpointsError(RuntimeError):
    """There are checkpoints, but none that can be used."""


class Restored(NamedTuple):
    """A checkpoint read back: the state, and the data iterator's state."""

    state: TrainState
    loader: dict[str, Any]


class Cadence:
    """When checkpoints are due: after so many steps, and when so much time has passed since the last one."""

    def __init__(self, section: CheckpointSection):
        """Begin to count the time."""
        self._section = section
        self._last = time.monotonic()

    def __str__(self) -> str:
        steps, minutes = self._section.every_steps, self._section.every_minutes
        by_steps = [] if steps is None else [f"every {steps} steps"]
        by_clock = [] if minutes is None else [f"every {minutes:g} minutes"]
        return "a checkpoint " + (" and ".join(by_steps + by_clock) or "only when the run is told to end")

    def due(self, step: int) -> bool:
        """Whether one is to be saved after this step."""
        steps, minutes = self._section.every_steps, self._section.every_minutes
        by_clock = minutes is not None and time.monotonic() - self._last >= 60 * minutes
        return by_clock or (steps is not None and step % steps == 0)

    def saved(self) -> None:
        """Count the time anew."""
        self._last = time.monotonic()


class Checkpoints:
    """The checkpoints of one run; every process of the run calls every method."""

    def __init__(self, directory: AnyPath, damaged: AnyPath, keep: int):
        """Keep the newest `keep` checkpoints in `directory`; damaged ones are moved to `damaged`.

        What an earlier run has not finished writing is removed.
        """
        self._directory, self._damaged = directory.resolve(), damaged.resolve()
        self._manager = _manager(self._directory, keep)
        self._saving: int | None = None

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, if there is one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, loader: dict[str, Any]) -> None:
        """Start writing the state; returns when it has been copied off the devices.

        Raises SaveError if this checkpoint or the one before it failed.
        """
        self.wait()
        self._saving = int(state.step)
        try:
            contents = StateSave(Contents(_as_dict(state), loader))
            self._manager.save(self._saving, args=contents, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Wait until everything saved is there. Raises SaveError if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def poll(self) -> None:
        """Raise SaveError if the checkpoint being written has failed; does not wait."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Wait for the last checkpoint and release threads. Raises SaveError if it failed."""
        self.wait()
        self._manager.close()

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that is whole, on the mesh of `abstract`; None if there is no checkpoint at all.

        Damaged ones are moved aside and named on standard output. Raises DamagedCheckpointsError if all are.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            directory = self._directory / str(step) / ITEM
            damaged = together(partial(damage, directory))
            if not agree_any(bool(damaged)):
                return self._read(step, abstract)
            self._set_aside(step, damaged)
        if steps:
            raise DamagedCheckpointsError(
                f"all checkpoints in {self._directory} were damaged and moved to {self._damaged}: "
                "start again with another training.output_dir"
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> Restored:
        wanted = _as_dict(abstract)
        arrays, loader = self._manager.restore(step, args=StateRestore(wanted))
        leaves = [arrays[name] for name in wanted]
        return Restored(jax.tree.unflatten(jax.tree.structure(abstract), leaves), loader)

    def _failed(self, error: BaseException) -> SaveError:
        reason = (str(error) or repr(error)).splitlines()[0].partition(" [source locations=")[0]
        try:
            whole = [int(p.name) for p in self._directory.iterdir() if p.name.isdecimal()]
            whole = [step for step in whole if step != self._saving]
            last = f"step {max(whole)} is intact" if whole else "there is no earlier one"
        except OSError:
            last = "the earlier ones cannot be looked at"
        return SaveError(
            f"checkpoint of step {self._saving} could not be written to {self._directory} ({last}): {reason}"
        )

    def _set_aside(self, step: int, damaged: list[str]) -> None:
        target = self._damaged / str(step)
        if jax.process_index() == 0:
            move_tree(self._directory / str(step), target)
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        listed = "; ".join(damaged[:3]) or "another process found it so"
        print(f"checkpoint {step} is damaged ({listed}); moved to {target}", flush=True)


def _manager(directory: AnyPath, keep: int) -> ocp.CheckpointManager:
    mode = ocp.options.AtomicityMode
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        # A bucket's names need no folder, and orbax's libraries would make the bucket too.
        create=not isinstance(directory, BucketPath),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # So that a store which refuses is noticed at once, not after the five minutes that others wait for a signal.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        # Orbax by itself knows of gs:// alone that renaming is copying.
        atomicity_options=ocp.options.AtomicityOptions(
            mode=mode.COMMIT_FILE if isinstance(directory, BucketPath) else mode.ATOMIC_RENAME
        ),
    )
    return ocp.CheckpointManager(str(directory), options=options)


def _as_dict(state: TrainState) -> dict[str, Any]:
    """A state as one dict from dotted names to arrays, the form that lasts across versions of optax and orbax."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }
