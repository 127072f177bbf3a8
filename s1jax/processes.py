"""The processes of a run: how one of them finds the others, and what they agree on."""

import hashlib
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from s1jax.config import DecodingMeshSection, ProcessesSection
from s1jax.launchers import Environment, LaunchError, find_place, local_device_ids
from s1jax.paths import AnyPath, write_whole

Result = TypeVar("Result")

START_SECONDS = 1800
"""How long the first process waits for the last one: machines of a gang come up one by one."""
HEARTBEAT_SECONDS = 60
"""A process that is not heard of for so long ends the others."""
_SHARED_SECONDS = 10
"""A shared file system may show a new file so much later on another host."""


class ProcessError(RuntimeError):
    """Processes that cannot be one run; the message says which one differs, and in what."""


@dataclass(frozen=True)
class Processes:
    """Which process of how many this is."""

    index: int = 0
    count: int = 1


def start_processes(
    section: ProcessesSection, environment: Environment | None = None, root: Path = Path("/")
) -> Processes:
    """Find out which process of how many this is, and join the others unless each has a copy of the model.

    `mesh.coordinator` and its companions win over what the launcher says. Must come before jax looks for devices.
    Raises LaunchError for what cannot be a run of several processes.
    """
    environment = os.environ if environment is None else environment
    place = find_place(environment, root)
    index = section.process_id if section.process_id is not None else place.index if place else None
    count = section.num_processes or (place.count if place else None)
    coordinator = section.coordinator or (place.coordinator if place else None)
    if section.coordinator and (index is None or count is None):
        raise LaunchError("mesh.coordinator: mesh.num_processes and mesh.process_id must be given too")
    if (index is None) != (count is None):
        raise LaunchError("mesh.num_processes and mesh.process_id are given together")
    processes = Processes(index or 0, count or 1)
    if processes.index >= processes.count:
        raise LaunchError(f"mesh.process_id={processes.index}: there are {processes.count} processes, from 0")
    devices = local_device_ids(place, environment, root) if place else []
    if processes.count > 1 and not (isinstance(section, DecodingMeshSection) and section.copies):
        if coordinator is None:
            raise LaunchError(
                f"process {processes.index} of {processes.count}: nothing says where the first one is; "
                "set mesh.coordinator=HOST:PORT"
            )
        _wait_for_name(coordinator)
        jax.distributed.initialize(
            coordinator,
            processes.count,
            processes.index,
            # Never None: jax would ask the launcher itself, and take one GPU for each process.
            local_device_ids=devices,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    elif devices:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, devices)))
    if place or processes.count > 1:
        source = "mesh.coordinator" if section.coordinator else place.launcher if place else "mesh.process_id"
        print(
            f"process {processes.index} of {processes.count} ({source}) on {socket.gethostname()}: "
            f"{jax.local_device_count()} of {jax.device_count()} devices",
            file=sys.stderr,
            flush=True,
        )
    return processes


def agree_any(flag: bool) -> bool:
    """Whether the flag is set in any process, the same answer in all."""
    return agree_each([flag])[0]


def agree_each(flags: Sequence[bool]) -> list[bool]:
    """Of each flag, whether it is set in any process, the same answer in all."""
    if jax.process_count() == 1:
        return list(flags)
    gathered = multihost_utils.process_allgather(np.array(flags))
    return [bool(flag) for flag in np.any(gathered, axis=0)]


def agree_all(flag: bool) -> bool:
    """Whether the flag is set in all processes, the same answer in all."""
    return flag if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(flag))))


def agree_least(number: int) -> int:
    """The least of all processes' numbers; collective."""
    return number if jax.process_count() == 1 else int(np.min(multihost_utils.process_allgather(np.array(number))))


def together(action: Callable[[], Result]) -> Result:
    """Do what may fail in one process alone; if it does, the others end with it, instead of waiting for it.

    The action may not itself wait for other processes. Raises what it raises, or ProcessError where another's failed.
    """
    try:
        result = action()
    except (ValueError, OSError, RuntimeError, ImportError):
        agree_all(False)
        raise
    if not agree_all(True):
        raise ProcessError("another process could not start; its own message says why")
    return result


def broadcast(content: bytes) -> bytes:
    """What the first process has, in all of them; the others' own `content` does not matter."""
    if jax.process_count() == 1:
        return content
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # Few lengths, since each is compiled.
    padded = np.zeros(max(64, 1 << (length - 1).bit_length()), np.uint8)
    if jax.process_index() == 0:
        padded[:length] = np.frombuffer(content, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)[:length])


def same_everywhere(facts: Mapping[str, str]) -> None:
    """Check that all processes have the same value under each name.

    Raises ProcessError, in all of them, that names who differs from the first process in what.
    """
    if jax.process_count() == 1:
        return
    names = sorted(facts)
    values = ["\n".join(names), *(facts[name] for name in names)]
    of_names = multihost_utils.process_allgather(_digest(values[0]))
    if (different := _unlike_first(of_names)).size:
        raise ProcessError(f"{_listed(different)} another version of s1jax than the first process")
    digests = multihost_utils.process_allgather(np.stack([_digest(value) for value in values]))
    for number, name in enumerate(names, start=1):
        if (different := _unlike_first(digests[:, number])).size:
            raise ProcessError(f"{name}: {_listed(different)} another value than the first process")


def see_same_directory(directory: AnyPath) -> None:
    """Check that what the first process writes into the directory is there for all.

    Raises ProcessError, in all of them, that names who does not see it.
    """
    if jax.process_count() == 1:
        return
    seal = directory / f".seen-{broadcast(secrets.token_hex(8).encode()).decode()}"
    if jax.process_index() == 0:
        write_whole(seal, socket.gethostname())
    agree_all(True)
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (seen := seal.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    everywhere = multihost_utils.process_allgather(np.array(seen))
    if jax.process_index() == 0:
        seal.unlink(missing_ok=True)
    if (blind := np.flatnonzero(~everywhere)).size:
        raise ProcessError(
            f"{directory}: {_listed(blind)} another directory than the first process: it must be on a file system that "
            "all hosts share, or be gs:// or s3://"
        )


def _digest(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode("utf-8")).digest(), np.uint8)


def _unlike_first(digests: np.ndarray) -> np.ndarray:
    return np.flatnonzero((digests != digests[:1]).any(axis=-1))


def _listed(processes: np.ndarray) -> str:
    numbers = ", ".join(map(str, processes.tolist()))
    return f"processes {numbers} have" if processes.size > 1 else f"process {numbers} has"


def _wait_for_name(address: str) -> None:
    """Wait until the first process's host has an address: on Kubernetes it gets its name when it starts."""
    host = address.rpartition(":")[0].strip("[]")
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(f"{address}: the first process's host is not known: {error}") from None
            time.sleep(2)
        else:
            return
