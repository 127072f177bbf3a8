"""A model's weights, configuration and tokenizer as a directory that transformers and vLLM load.

On a disk it is written under a temporary name and gets its own when it is complete. In a bucket config.json is written
last: without one, nothing there is a model to anybody.
"""

import contextlib
import json
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

from s1jax.config import Quantisation
from s1jax.model.adapter import adapter_config, adapter_layouts
from s1jax.model.config import QUANTISED, QwenConfig
from s1jax.model.config_json import read_config_json
from s1jax.model.hf import Tensor, checkpoint_tensors, expected_shapes, get_at, stored_tensors
from s1jax.model.hf_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_FILE, SINGLE_FILE
from s1jax.model.hf_names import TensorLayout, scale_name, tensor_layouts
from s1jax.model.projection import widened
from s1jax.model.quantisation import QuantisedTensor, to_stored
from s1jax.model.qwen import Params, Qwen
from s1jax.model.safetensors_files import DTYPES, CheckpointError, StoredTensor, make_file, num_bytes
from s1jax.paths import AnyPath, BucketPath, remove_tree, write_whole
from s1jax.tokenizer import TOKENIZER_FILES

_MAX_FILE_BYTES = 5_000_000_000
_MAX_OBJECT_BYTES = 1_000_000_000
_UPLOADS = 4
"""Objects on their way at once: one connection to a bucket has a tenth of a host's bandwidth."""
_BLOCK_BYTES = 2**25
"""What is read and quantised at a time."""
_QUANTISERS = 4
"""Threads that do."""

_Fill = Callable[[str, np.ndarray | None], None]
"""Puts the tensor of this name where a file has it, in the process that writes; is called in all of them."""


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
    _refuse_existing(directory)
    dtype = np.dtype(dtype or model.param_dtype)
    layouts = tensor_layouts(model.config)
    with _new_directory(directory) as target:
        _write_weights(target, *_stored(model, params, layouts, dtype), max_file_bytes)
        if target:
            config = read_config_json(source) if source else model.config.to_hf()
            config.pop("quantization_config", None)
            # Both names of it: transformers 5 reads the first, version 4 and vLLM the second.
            config["dtype"] = config["torch_dtype"] = dtype.name
            _write_texts(target, config, source)


def export_quantised(
    directory: AnyPath,
    source: AnyPath,
    quantisation: Quantisation,
    *,
    adapter: AnyPath | None = None,
    max_file_bytes: int | None = None,
) -> None:
    """Write a directory whose weights are integers with scales: those that reading makes of `source`.

    All else is as it is there; the adapter is merged. Files are as those of `export_model`. One process does it.
    Raises CheckpointError as `export_model`, and for a source that cannot be read or is not finite.
    """
    _refuse_existing(directory)
    model = Qwen(QwenConfig.from_directory(source), quantisation=quantisation)
    tensors = checkpoint_tensors(source, model, adapter)
    shapes = expected_shapes(model, tensor_layouts(model.config, scales=True))
    with _whole_directory(directory) as target, ThreadPoolExecutor(_QUANTISERS) as pool:

        def fill(name: str, place: np.ndarray | None) -> None:
            assert place is not None
            step = max(1, _BLOCK_BYTES // tensors[name].row_bytes)

            def fill_rows(start: int) -> None:
                rows = tensors[name].read_rows(start, min(start + step, len(place)))
                if jnp.issubdtype(rows.dtype, jnp.floating) and not np.isfinite(rows).all():
                    weight = name.removesuffix(scale_name(""))
                    raise CheckpointError(source, [f"NaN or infinite weights in {weight}"])
                place[start : start + step] = to_stored(rows)

            for _ in pool.map(fill_rows, range(0, len(place), step)):
                pass

        _write_weights(target, {name: _as_written(tensors[name]) for name in shapes}, fill, max_file_bytes)
        config = {**read_config_json(source), "quantization_config": QUANTISED[quantisation]}
        _write_texts(target, config, source)


def _as_written(tensor: Tensor) -> jax.ShapeDtypeStruct:
    """What a quantised directory has of a tensor that it is made of."""
    if isinstance(tensor, QuantisedTensor):
        return tensor.stored
    assert isinstance(tensor, StoredTensor)
    return jax.ShapeDtypeStruct(tensor.shape, DTYPES[tensor.dtype])


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
        content = _file(target, *_stored(model, params, layouts, np.dtype(model.param_dtype)))
        if target:
            write_whole(target / ADAPTER_WEIGHTS, content)
            write_whole(target / ADAPTER_CONFIG, adapter_config(model.lora, base).encode())


def _refuse_existing(directory: AnyPath) -> None:
    if is_exported(directory) or (isinstance(directory, Path) and directory.exists()):
        raise CheckpointError(directory, ["already exists; choose another name or remove it"])


@contextlib.contextmanager
def _new_directory(directory: AnyPath) -> Iterator[AnyPath | None]:
    """`_whole_directory` of the first process; None for the others, which wait for it."""
    if jax.process_index() == 0:
        with _whole_directory(directory) as target:
            yield target
    else:
        yield None
    multihost_utils.sync_global_devices(f"exported {directory}")


@contextlib.contextmanager
def _whole_directory(directory: AnyPath) -> Iterator[AnyPath]:
    """Where to write what gets its name when all is there.

    Raises CheckpointError for an OSError, with nothing left behind.
    """
    target = directory if isinstance(directory, BucketPath) else directory.with_name(f".{directory.name}.partial")
    try:
        remove_tree(target)
        yield target
        if isinstance(target, Path) and isinstance(directory, Path):
            _sync(target)
            target.rename(directory)
    except (OSError, CheckpointError) as error:
        with contextlib.suppress(OSError):
            remove_tree(target)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(directory, [f"could not be written: {error}"]) from error


def _write_weights(
    directory: AnyPath | None, tensors: dict[str, jax.ShapeDtypeStruct], fill: _Fill, max_file_bytes: int | None
) -> None:
    """The weights, in as many files as they need."""
    limit = max_file_bytes or (_MAX_OBJECT_BYTES if isinstance(directory, BucketPath) else _MAX_FILE_BYTES)
    files = _files(tensors, limit)
    weight_map = {}
    under_way: deque[Future[None]] = deque()
    with ThreadPoolExecutor(_UPLOADS if isinstance(directory, BucketPath) else 1) as pool:
        for number, names in enumerate(files, start=1):
            file = SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
            weight_map.update(dict.fromkeys(names, file))
            content = _file(directory, {name: tensors[name] for name in names}, fill)
            if directory:
                if len(under_way) == _UPLOADS:
                    under_way.popleft().result()
                under_way.append(pool.submit(write_whole, directory / file, content))
        for future in under_way:
            future.result()
    if directory and len(files) > 1:
        total = sum(map(num_bytes, tensors.values()))
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _files(tensors: dict[str, jax.ShapeDtypeStruct], max_bytes: int) -> list[list[str]]:
    """The names of each file's tensors."""
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + num_bytes(tensor) > max_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += num_bytes(tensor)
    return files


def _file(directory: AnyPath | None, tensors: dict[str, jax.ShapeDtypeStruct], fill: _Fill) -> bytearray:
    """A file's bytes; empty without a directory."""
    content, places = make_file(tensors if directory else {})
    for name in tensors:
        fill(name, places.get(name))
    return content


def _stored(
    model: Qwen, params: Params, layouts: list[TensorLayout], dtype: np.dtype
) -> tuple[dict[str, jax.ShapeDtypeStruct], _Fill]:
    """The tensors that stacked parameters are stored as, and what fills them.

    Every process computes what is stored; the one that writes fetches it.
    """
    places = {layout.name.format(layer): (layout, layer) for layout, layer in stored_tensors(model, layouts)}

    def fill(name: str, place: np.ndarray | None) -> None:
        layout, layer = places[name]
        stored = _as_stored(layout, dtype, model, params, layer).block_until_ready()
        if place is not None:
            np.copyto(place, np.asarray(stored))

    shapes = expected_shapes(model, layouts)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}, fill


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
        if isinstance(own, dict):
            own = _merged(own, scale, outputs_first=layout.as_stored)
        # Cast first: that much less is sent and transposed.
        return layout.to_hf(own.astype(dtype))

    return jax.jit(convert, static_argnums=(0, 1, 4), out_shardings=whole)


def _merged(projection: Params, adapter_scale: float, outputs_first: bool) -> jax.Array:
    """One layer's weight of a projection, or a table's: widened if it is of integers, with what an adapter adds."""
    weight = projection["weight"]
    if (scale := projection.get("scale")) is not None:
        weight = widened(weight, scale, weight.ndim - scale.ndim + 1, outputs_first)
    if "lora_a" not in projection:
        return weight
    a, b = projection["lora_a"], projection["lora_b"]
    added = jnp.tensordot(a, b, axes=1, precision="highest", preferred_element_type=jnp.float32)
    return weight.astype(jnp.float32) + adapter_scale * added


def _write_texts(directory: AnyPath, config: dict[str, Any], source: AnyPath | None) -> None:
    """generation_config.json, the tokenizer's files, and config.json."""
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
