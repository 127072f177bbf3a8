"""Checkpoints that are either whole or not there, and that say so when a disk has damaged them.

Orbax writes them (asynchronously, sharded, under a temporary name until complete); beside each lies a manifest of its
files' SHA-256, because a flipped byte in an array restores without an error.
"""

import hashlib
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from s1jax.training.step import TrainState


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are intact."""


class DamagedCheckpointsError(RuntimeError):
    """There are checkpoints, but none that can be used."""


class Restored(NamedTuple):
    """A checkpoint read back: the state, and the data iterator's state."""

    state: TrainState
    loader: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; every process of the run calls every method."""

    def __init__(self, directory: Path, damaged: Path, keep: int):
        """Keep the newest `keep` checkpoints in `directory`; damaged ones are moved to `damaged`."""
        self._directory, self._damaged = directory.resolve(), damaged.resolve()
        self._manager = self._open(keep)
        self._keep = keep
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sealing: tuple[int, Future[None]] | None = None

    def _open(self, keep: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        return ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, if there is one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, loader: dict[str, Any]) -> None:
        """Start writing the state; returns when it has been copied off the devices.

        Raises SaveError if this checkpoint or the one before it failed.
        """
        self.wait()
        step = int(state.step)
        try:
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)), loader=ocp.args.JsonSave(loader)
            )
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._sealing = step, self._sealer.submit(self._seal, step)

    def wait(self) -> None:
        """Wait until everything saved is on disk. Raises SaveError if it failed."""
        if self._sealing is None:
            return
        (step, future), self._sealing = self._sealing, None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error

    def poll(self) -> None:
        """Raise SaveError if the checkpoint being written has failed; does not wait."""
        if self._sealing and self._sealing[1].done():
            self.wait()

    def close(self) -> None:
        """Wait for the last checkpoint and release threads. Raises SaveError if it failed."""
        self.wait()
        self._sealer.shutdown(wait=True)
        self._manager.close()

    def restore(self, abstract: TrainState) -> Restored | None:
        """The newest checkpoint that is whole, on the mesh of `abstract`; None if there is no checkpoint at all.

        Damaged ones are moved aside and named on standard output. Raises DamagedCheckpointsError if all are.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            damage = self._changed_files(step)
            if not _anywhere(bool(damage)):
                sealed = _everywhere(self._manifest(step).is_file())
                try:
                    return self._read(step, abstract)
                except Exception as error:
                    if sealed:
                        raise
                    damage = [str(error).splitlines()[0]]
            self._set_aside(step, damage)
        if steps:
            raise DamagedCheckpointsError(
                f"all checkpoints in {self._directory} were damaged and moved to {self._damaged}: "
                "start again with another training.output_dir"
            )
        return None

    def _read(self, step: int, abstract: TrainState) -> Restored:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(_as_dict(abstract)), loader=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=arguments)
        leaves = [restored["state"][name] for name in _as_dict(abstract)]
        return Restored(jax.tree.unflatten(jax.tree.structure(abstract), leaves), restored["loader"])

    def _failed(self, step: int, error: BaseException) -> SaveError:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        whole = [s for s in self._open(self._keep).all_steps() if s != step]
        last = f"step {max(whole)} is intact" if whole else "there is no earlier one"
        return SaveError(f"checkpoint of step {step} could not be written to {self._directory} ({last}): {reason}")

    def _seal(self, step: int) -> None:
        """When the checkpoint is complete, write down what its files are; processes share the files among them."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manifest(step).write_text(json.dumps(self._digests(step)), encoding="utf-8")

    def _manifest(self, step: int) -> Path:
        return self._directory / str(step) / f"manifest.{jax.process_index()}.json"

    def _files(self, step: int) -> list[Path]:
        root = self._directory / str(step)
        return sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("manifest."))

    def _digests(self, step: int) -> dict[str, str]:
        digests = {}
        for path in self._files(step)[jax.process_index() :: jax.process_count()]:
            with path.open("rb") as file:
                digests[str(path.relative_to(self._directory))] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests

    def _changed_files(self, step: int) -> list[str]:
        """Files that are not what some manifest says; a checkpoint whose run ended before it was sealed has none."""
        changed = []
        manifests = sorted((self._directory / str(step)).glob("manifest.*.json"))
        for manifest in manifests[jax.process_index() :: jax.process_count()]:
            try:
                digests = json.loads(manifest.read_text(encoding="utf-8"))
            except ValueError:
                continue  # Cut short by the end of the run: as good as none.
            for name, digest in digests.items():
                path = self._directory / name
                if not path.is_file():
                    changed.append(f"{name} is gone")
                    continue
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        changed.append(f"{name} has changed")
        return changed

    def _set_aside(self, step: int, damage: list[str]) -> None:
        target = self._damaged / str(step)
        if jax.process_index() == 0:
            self._damaged.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            (self._directory / str(step)).rename(target)
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        listed = "; ".join(damage[:3]) or "another process found it so"
        print(f"checkpoint {step} is damaged ({listed}); moved to {target}", flush=True)


def _as_dict(state: TrainState) -> dict[str, Any]:
    """A state as one dict from dotted names to arrays, the form that lasts across versions of optax and orbax."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(state)
    }


def _anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _everywhere(flag: bool) -> bool:
    """Whether the flag is set in all processes."""
    return bool(np.all(multihost_utils.process_allgather(np.array(flag))))
