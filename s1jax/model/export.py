"""A model's weights, configuration and tokenizer as a directory that transformers and vLLM load.

On a disk it is written under a temporary name and gets its own when it is complete. In a bucket config.json is written
last: without one, nothing there is a model to anybody.
"""

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from s1jax.model.config_json import read_config_json
from s1jax.model.hf import INDEX_FILE, SINGLE_FILE, expected_shapes, get_at, stored_tensors
from s1jax.model.hf_names import TensorLayout
from s1jax.model.qwen import Params, Qwen
from s1jax.model.safetensors_files import CheckpointError, make_file
from s1jax.paths import AnyPath, BucketPath, remove_tree, write_whole
from s1jax.tokenizer import TOKENIZER_FILES

_MAX_FILE_BYTES = 5_000_000_000
_MAX_OBJECT_BYTES = 1_000_000_000
_UPLOADS = 4
"""Objects on their way at once: one connection to a bucket has a tenth of a host's bandwidth."""


def is_exported(directory: AnyPath) -> bool:
    """Whether there is a whole model."""
    return (directory / "config.json").is_file()


def export_model(
    directory: AnyPath,
    model: Qwen,
    params: Params,
    *,
    source: AnyPath | None = None,
    dtype: DTypeLike | None = None,
    max_file_bytes: int | None = None,
) -> None:
    """Write a directory that transformers and vLLM load; all processes take part, the first one writes.

    `source` is the model directory that the configuration and the tokenizer files come from. `dtype` is what the
    weights are stored as (default: as they are); they are cast where they lie, and only the first process has them
    sent from its devices. Files have at most `max_file_bytes` (default: 5 GB, in a bucket 1 GB), or one tensor.

    Raises CheckpointError if `directory` exists or cannot be written; then no model stands under that name.
    """
    if is_exported(directory) or (isinstance(directory, Path) and directory.exists()):
        raise CheckpointError(directory, ["already exists; choose another name or remove it"])
    dtype = np.dtype(dtype or model.param_dtype)
    in_bucket = isinstance(directory, BucketPath)
    limit = max_file_bytes or (_MAX_OBJECT_BYTES if in_bucket else _MAX_FILE_BYTES)
    target = directory if in_bucket else directory.with_name(f".{directory.name}.partial")
    writer = jax.process_index() == 0
    try:
        if writer:
            remove_tree(target)
        with ThreadPoolExecutor(_UPLOADS if in_bucket else 1) as pool:
            _write_weights(target if writer else None, pool, model, params, dtype, limit)
        if writer:
            _write_texts(target, model, source, dtype)
            if isinstance(target, Path) and isinstance(directory, Path):
                _sync(target)
                target.rename(directory)
    except OSError as error:
        if writer:
            with contextlib.suppress(OSError):
                remove_tree(target)
        raise CheckpointError(directory, [f"could not be written: {error}"]) from error
    multihost_utils.sync_global_devices(f"exported {directory}")


def _write_weights(
    directory: AnyPath | None,
    pool: ThreadPoolExecutor,
    model: Qwen,
    params: Params,
    dtype: np.dtype,
    max_file_bytes: int,
) -> None:
    """Every process computes what is stored; the one that has a directory fetches it and writes."""
    files = _files(model, dtype, max_file_bytes)
    shapes = expected_shapes(model)
    weight_map = {}
    under_way: deque[Future[None]] = deque()
    for number, tensors in enumerate(files, start=1):
        file = SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        names = [layout.name.format(layer) for layout, layer in tensors]
        weight_map.update(dict.fromkeys(names, file))
        content, places = make_file({name: shapes[name] for name in names if directory}, dtype)
        for name, (layout, layer) in zip(names, tensors, strict=True):
            stored = _as_stored(layout, dtype, get_at(params, layout.path), layer).block_until_ready()
            if directory:
                np.copyto(places[name], np.asarray(stored))
        if directory:
            if len(under_way) == _UPLOADS:
                under_way.popleft().result()
            under_way.append(pool.submit(write_whole, directory / file, content))
    for future in under_way:
        future.result()
    if directory and len(files) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _files(model: Qwen, dtype: np.dtype, max_bytes: int) -> list[list[tuple[TensorLayout, int]]]:
    """The tensors of each file, as layout and layer."""
    shapes = expected_shapes(model)
    files: list[list[tuple[TensorLayout, int]]] = [[]]
    size = 0
    for layout, layer in stored_tensors(model):
        nbytes = math.prod(shapes[layout.name.format(layer)]) * dtype.itemsize
        if files[-1] and size + nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append((layout, layer))
        size += nbytes
    return files


def _as_stored(layout: TensorLayout, dtype: np.dtype, array: jax.Array, layer: int) -> jax.Array:
    """One tensor as it is stored, where every process has it whole."""
    sharding = array.sharding
    if not array.is_fully_addressable and isinstance(sharding, NamedSharding):
        return _converter(NamedSharding(sharding.mesh, PartitionSpec()))(layout, dtype, array, layer)
    return _converter(None)(layout, dtype, array, layer)


@lru_cache(maxsize=4)
def _converter(whole: NamedSharding | None) -> Callable[[TensorLayout, np.dtype, jax.Array, int], jax.Array]:
    def convert(layout: TensorLayout, dtype: np.dtype, array: jax.Array, layer: jax.Array) -> jax.Array:
        # Cast first: that much less is sent and transposed.
        return layout.to_hf((array[layer] if layout.per_layer else array).astype(dtype))

    return jax.jit(convert, static_argnums=(0, 1), out_shardings=whole)


def _write_texts(directory: AnyPath, model: Qwen, source: AnyPath | None, dtype: np.dtype) -> None:
    """generation_config.json, the tokenizer's files, and config.json."""
    config: dict[str, Any] = read_config_json(source) if source else model.config.to_hf()
    # Both names of it: transformers 5 reads the first, version 4 and vLLM the second.
    config["dtype"] = config["torch_dtype"] = dtype.name
    copied = [source / name for name in ("generation_config.json", *TOKENIZER_FILES)] if source else []
    for file in copied:
        if file.is_file():
            write_whole(directory / file.name, file.read_bytes())
    if not (directory / "generation_config.json").is_file():
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(directory / "generation_config.json", {k: v for k, v in config.items() if k in special})
    _write_json(directory / "config.json", config)


def _write_json(path: AnyPath, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _sync(directory: Path) -> None:
    """Have the disk hold the names of the files before the directory gets its final one."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
