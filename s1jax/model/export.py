"""A model's weights, configuration and tokenizer as a directory that transformers and vLLM load.

On a disk it is written under a temporary name and gets its own when it is complete. In a bucket config.json is written
last: without one, nothing there is a model to anybody.
"""

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from s1jax.model.adapter import adapter_config, adapter_layouts
from s1jax.model.config_json import read_config_json
from s1jax.model.hf import expected_shapes, get_at, stored_tensors
from s1jax.model.hf_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_FILE, SINGLE_FILE
from s1jax.model.hf_names import TensorLayout, tensor_layouts
from s1jax.model.projection import widened
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

    A model's adapters are merged into its weights, and integers are widened. Raises CheckpointError if `directory`
    exists or cannot be written; then no model stands under that name.
    """
    if is_exported(directory) or (isinstance(directory, Path) and directory.exists()):
        raise CheckpointError(directory, ["already exists; choose another name or remove it"])
    dtype = np.dtype(dtype or model.param_dtype)
    limit = max_file_bytes or (_MAX_OBJECT_BYTES if isinstance(directory, BucketPath) else _MAX_FILE_BYTES)
    with _new_directory(directory) as target:
        _write_model(target, model, params, dtype, limit)
        if target:
            _write_texts(target, model, source, dtype)


def export_adapter(directory: AnyPath, model: Qwen, params: Params, *, base: str) -> None:
    """Write a model's adapters as PEFT does, in their own dtype, in place of an earlier directory of that name.

    `base` is what they say their model is called. All processes take part, the first one writes. Raises
    CheckpointError if it cannot.
    """
    assert model.lora is not None
    if jax.process_index() == 0:
        remove_tree(directory)
    layouts = adapter_layouts(tensor_layouts(model.config), model.lora)
    with _new_directory(directory) as target:
        tensors, shapes = list(stored_tensors(model, layouts)), expected_shapes(model, layouts)
        content = _file(target, model, params, tensors, shapes, np.dtype(model.param_dtype))
        if target:
            write_whole(target / ADAPTER_WEIGHTS, content)
            write_whole(target / ADAPTER_CONFIG, adapter_config(model.lora, base).encode())


@contextlib.contextmanager
def _new_directory(directory: AnyPath) -> Iterator[AnyPath | None]:
    """Where the first process writes, which gets the name that it is to have when all is there; None for the others.

    Raises CheckpointError for an OSError, with nothing left behind.
    """
    target = directory if isinstance(directory, BucketPath) else directory.with_name(f".{directory.name}.partial")
    writer = jax.process_index() == 0
    try:
        if writer:
            remove_tree(target)
        yield target if writer else None
        if writer and isinstance(target, Path) and isinstance(directory, Path):
            _sync(target)
            target.rename(directory)
    except OSError as error:
        if writer:
            with contextlib.suppress(OSError):
                remove_tree(target)
        raise CheckpointError(directory, [f"could not be written: {error}"]) from error
    multihost_utils.sync_global_devices(f"exported {directory}")


def _write_model(directory: AnyPath | None, model: Qwen, params: Params, dtype: np.dtype, max_file_bytes: int) -> None:
    """The weights, in as many files as they need."""
    shapes = expected_shapes(model, tensor_layouts(model.config))
    files = _files(model, shapes, dtype, max_file_bytes)
    weight_map = {}
    under_way: deque[Future[None]] = deque()
    with ThreadPoolExecutor(_UPLOADS if isinstance(directory, BucketPath) else 1) as pool:
        for number, tensors in enumerate(files, start=1):
            file = SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            weight_map.update({layout.name.format(layer): file for layout, layer in tensors})
            content = _file(directory, model, params, tensors, shapes, dtype)
            if directory:
                if len(under_way) == _UPLOADS:
                    under_way.popleft().result()
                under_way.append(pool.submit(write_whole, directory / file, content))
        for future in under_way:
            future.result()
    if directory and len(files) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _files(
    model: Qwen, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, max_bytes: int
) -> list[list[tuple[TensorLayout, int]]]:
    """The tensors of each file, as layout and layer."""
    files: list[list[tuple[TensorLayout, int]]] = [[]]
    size = 0
    for layout, layer in stored_tensors(model, tensor_layouts(model.config)):
        nbytes = math.prod(shapes[layout.name.format(layer)]) * dtype.itemsize
        if files[-1] and size + nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append((layout, layer))
        size += nbytes
    return files


def _file(
    directory: AnyPath | None,
    model: Qwen,
    params: Params,
    tensors: list[tuple[TensorLayout, int]],
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
) -> bytearray:
    """A file's bytes. Every process computes what is stored; the one that has a directory fetches it."""
    names = [layout.name.format(layer) for layout, layer in tensors]
    content, places = make_file({name: shapes[name] for name in names if directory}, dtype)
    for name, (layout, layer) in zip(names, tensors, strict=True):
        stored = _as_stored(layout, dtype, model, params, layer).block_until_ready()
        if directory:
            np.copyto(places[name], np.asarray(stored))
    return content


def _as_stored(layout: TensorLayout, dtype: np.dtype, model: Qwen, params: Params, layer: int) -> jax.Array:
    """One tensor as it is stored, where every process has it whole."""
    array = get_at(params, layout.path)
    sharding, whole = array.sharding, None
    if not array.is_fully_addressable and isinstance(sharding, NamedSharding):
        whole = NamedSharding(sharding.mesh, PartitionSpec())
    if layout.path[-1] == "weight":
        adapter_scale = model.lora.scale if model.lora else 0.0
        return _converter(whole)(layout, dtype, get_at(params, layout.path[:-1]), layer, adapter_scale)
    return _converter(whole)(layout, dtype, array, layer)


@lru_cache(maxsize=4)
def _converter(whole: NamedSharding | None) -> Callable[..., jax.Array]:
    def convert(layout: TensorLayout, dtype: np.dtype, stack: Any, layer: jax.Array, scale: float = 0.0) -> jax.Array:
        own = jax.tree.map(lambda array: array[layer] if layout.per_layer else array, stack)
        # Cast first: that much less is sent and transposed.
        return layout.to_hf((_merged(own, scale) if isinstance(own, dict) else own).astype(dtype))

    return jax.jit(convert, static_argnums=(0, 1, 4), out_shardings=whole)


def _merged(projection: Params, adapter_scale: float) -> jax.Array:
    """One layer's weight of a stacked projection: widened if it is of integers, with what an adapter adds."""
    weight = projection["weight"]
    if (scale := projection.get("scale")) is not None:
        weight = widened(weight, scale, weight.ndim - scale.ndim + 1, outputs_first=False)
    if "lora_a" not in projection:
        return weight
    a, b = projection["lora_a"], projection["lora_b"]
    added = jnp.tensordot(a, b, axes=1, precision="highest", preferred_element_type=jnp.float32)
    return weight.astype(jnp.float32) + adapter_scale * added


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
