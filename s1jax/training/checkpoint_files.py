"""The files of a checkpoint, the same on disks and in buckets, and how orbax has them written and read.

Each array is a zarr array of plain bytes, cut into chunks that are each part of one device's shard; tensorstore writes
and reads them. `manifest.N.json`, written last by process N, has a digest of every file that this process wrote,
because a flipped byte in an array restores without an error: on a disk it is made of what is in memory, in a bucket it
is the store's own.
"""

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from s1jax.paths import AnyPath, BucketPath, any_path, write_whole
from s1jax.strict_json import parse_json

ITEM = "default"
"""What orbax calls the directory of a step's only item."""
_CHUNK_BYTES = 2**27
"""Of a file, where the array can be cut so: many are written, read and digested at once."""
_READERS = 4
"""Arrays read at once; so are the chunks of each."""
_LOADER = "loader.json"


class Contents(NamedTuple):
    """What a checkpoint holds: arrays by name, and the state of the data iterator, the same in all processes."""

    arrays: dict[str, jax.Array]
    loader: dict[str, Any]


class StateHandler(ocp.AsyncCheckpointHandler):
    """What orbax calls to save and restore; every process of the run does."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    async def async_save(self, directory: Any, args: "StateSave") -> list[Future[None]]:
        """Copy the arrays off the devices; what is returned is done when their files are written."""
        arrays = args.contents.arrays
        mine = [(name, s) for name, x in arrays.items() for s in x.addressable_shards if s.replica_id == 0]
        for _, shard in mine:
            shard.data.copy_to_host_async()
        shards = [_Shard(name, _origin(shard.index), _in_host_memory(shard.data)) for name, shard in mine]
        grids = {name: _grid(array) for name, array in arrays.items()}
        target = any_path(str(directory))
        return [self._writer.submit(_write, target, grids, shards, args.contents.loader)]

    def save(self, directory: Any, args: "StateSave") -> None:
        """As `async_save`, and wait."""
        for written in asyncio.run(self.async_save(directory, args)):
            written.result()

    def restore(self, directory: Any, args: "StateRestore") -> Contents:
        """The arrays in the shapes, dtypes and shardings asked for."""
        source = any_path(str(directory))
        with ThreadPoolExecutor(_READERS) as readers:
            arrays = readers.map(lambda item: _read(source / item[0], *item), args.arrays.items())
            return Contents(
                dict(zip(args.arrays, arrays, strict=True)), json.loads((source / _LOADER).read_text(encoding="utf-8"))
            )

    def close(self) -> None:
        """End the thread."""
        self._writer.shutdown()


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclass
class StateSave(ocp.args.CheckpointArgs):
    """What is saved."""

    contents: Contents


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclass
class StateRestore(ocp.args.CheckpointArgs):
    """What is restored."""

    arrays: Mapping[str, jax.ShapeDtypeStruct]


def damage(directory: AnyPath) -> list[str]:
    """Files of a checkpoint that are not what its manifests say; each process looks at its share of them.

    Raises OSError if they cannot be looked at.
    """
    files: dict[str, str] = {}
    count = number = 0
    while number <= count:
        manifest = _manifest(directory, number)
        try:
            content = _unsealed(manifest.read_bytes())
            count, more = content["processes"] - 1, dict(content["files"])
        except FileNotFoundError:
            return [f"{manifest.name} is gone"]
        except (ValueError, KeyError, TypeError):
            return [f"{manifest.name} has changed"]
        files.update(more)
        number += 1
    names = sorted(files)[jax.process_index() :: jax.process_count()]
    found = _digests(directory, names)
    return [
        f"{name} {'has changed' if name in found else 'is gone'}" for name in names if found.get(name) != files[name]
    ]


class _Shard(NamedTuple):
    """A part of an array in host memory, and where it begins in the whole."""

    name: str
    origin: tuple[int, ...]
    values: np.ndarray


class _Grid(NamedTuple):
    """An array as it is stored."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]


def _origin(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(cut.start or 0 for cut in index)


def _in_host_memory(array: jax.Array) -> np.ndarray:
    """A copy that stays as it is when the device's memory is used again."""
    (device,) = array.devices()
    return np.array(array) if device.platform == "cpu" else np.asarray(array)


def _grid(array: jax.Array) -> _Grid:
    """Chunks that divide a shard along its first dimension."""
    shard = array.sharding.shard_shape(array.shape)
    rows = shard[0] if shard else 1
    most = max(1, _CHUNK_BYTES * rows // max(1, math.prod(shard) * array.dtype.itemsize))
    step = next(n for n in range(min(rows, most), 0, -1) if rows % n == 0)
    return _Grid(array.shape, array.dtype.name, (step, *shard[1:]) if shard else ())


def _write(directory: AnyPath, grids: dict[str, _Grid], shards: list[_Shard], loader: dict[str, Any]) -> None:
    """Write this process's shards, and then what they are."""
    first = jax.process_index() == 0
    stores = {
        name: ts.open(
            _zarr(directory / name, grid), open=True, create=first, assume_metadata=not first, context=_context()
        )
        for name, grid in grids.items()
    }
    writes = []
    for shard in shards:
        box = tuple(slice(start, start + size) for start, size in zip(shard.origin, shard.values.shape, strict=True))
        store = stores[shard.name].result()
        writes.append(store[box].write(shard.values, can_reference_source_data_indefinitely=True))
    chunks = dict(chunk for shard in shards for chunk in _chunks(shard, grids[shard.name]))
    small = []
    if first:
        write_whole(directory / _LOADER, json.dumps(loader))
        small = [_LOADER, *(f"{name}/zarr.json" for name in grids)]
    if isinstance(directory, BucketPath):
        digests = {}
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = dict(zip(chunks, pool.map(_sha256, chunks.values()), strict=True))
    for write in writes:
        write.result()
    rest = [name for name in [*small, *chunks] if name not in digests]
    digests |= _digests(directory, rest)
    if missing := [name for name in rest if name not in digests]:
        raise FileNotFoundError(f"{directory}: {missing[0]} has been written, and is not there")
    manifest = {"processes": jax.process_count(), "files": digests}
    write_whole(_manifest(directory, jax.process_index()), json.dumps(_sealed(manifest)))


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with a digest of itself: one that has lost an entry would let a damaged file pass."""
    return {**manifest, "digest": hashlib.sha256(json.dumps(manifest).encode()).hexdigest()}


def _unsealed(content: bytes) -> dict[str, Any]:
    """The manifest in a file. Raises ValueError if it is not what was written."""
    manifest = parse_json(content)
    if not isinstance(manifest, dict) or manifest != _sealed({k: v for k, v in manifest.items() if k != "digest"}):
        raise ValueError("not the manifest that was written")
    return manifest


def _read(directory: AnyPath, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of which each part is read once, however many devices of this process have it."""
    store = ts.open(_zarr(directory), open=True, read=True, context=_context()).result()
    if store.shape != leaf.shape:
        raise ValueError(f"{directory}: {name} has shape {list(store.shape)}, expected {list(leaf.shape)}")
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        spans = tuple(cut.indices(size)[:2] for cut, size in zip(index or (), leaf.shape, strict=True))
        devices.setdefault(spans, []).append(device)
    parts = []
    for spans, holders in devices.items():
        values = store[tuple(slice(*span) for span in spans)].read().result().astype(leaf.dtype, copy=False)
        parts += [jax.device_put(values, device) for device in holders]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _chunks(shard: _Shard, grid: _Grid) -> Iterator[tuple[str, np.ndarray]]:
    """The files of a shard by the names that zarr gives them, and what is in each."""
    if not grid.shape:
        yield f"{shard.name}/c", shard.values
        return
    for row in range(0, shard.values.shape[0], grid.chunk[0]):
        corner = (shard.origin[0] + row, *shard.origin[1:])
        numbers = "/".join(str(at // size) for at, size in zip(corner, grid.chunk, strict=True))
        yield f"{shard.name}/c/{numbers}", shard.values[row : row + grid.chunk[0]]


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()


def _digests(directory: AnyPath, names: Sequence[str]) -> dict[str, str]:
    """Of those of these files that are there: SHA-256 by as many threads as processors, or what the store says."""
    if isinstance(directory, BucketPath):
        sums = directory.checksums_below()
        return {name: sums[name] for name in names if name in sums}

    def digest(name: str) -> str | None:
        try:
            with (directory / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {name: found for name, found in zip(names, pool.map(digest, names), strict=True) if found}


def _manifest(directory: AnyPath, process: int) -> AnyPath:
    return directory / f"manifest.{process}.json"


def _zarr(directory: AnyPath, grid: _Grid | None = None) -> dict[str, Any]:
    """tensorstore's description of an array; of one that is to be made if a grid is given."""
    specification: dict[str, Any] = {"driver": "zarr3", "kvstore": _store(directory)}
    if grid:
        specification["store_data_equal_to_fill_value"] = True  # Every file is there, so that a lost one is missed.
        specification["metadata"] = {
            "shape": grid.shape,
            "data_type": grid.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid.chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
    return specification


def _store(directory: AnyPath) -> dict[str, Any]:
    """Where tensorstore finds a directory."""
    if not isinstance(directory, BucketPath):
        return {"driver": "file", "path": f"{directory}/"}
    place = {"bucket": directory.bucket, "path": f"{directory.object_name}/"}
    if directory.scheme == "gs":
        return {"driver": "gcs", **place}
    # Unlike botocore, tensorstore does not look for these itself.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        place |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return {"driver": "s3", **place}


def _context() -> ts.Context:
    # Else files are looked for first, with pages of complaints where there are none.
    return _shared_context("environment" if "AWS_ACCESS_KEY_ID" in os.environ else "default")


@cache
def _shared_context(aws_credentials: str) -> ts.Context:
    """Connections and credentials for all arrays."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "aws_credentials": {"type": aws_credentials}})
