"""Weights between Hugging Face directories and sharded arrays.

Reading checks the whole directory first, then each process reads just the slices that its devices hold, one tensor at
a time. Writing goes to a temporary directory that gets its name only when it is complete.
"""

import json
import math
import mmap
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from s1jax.model.config import read_config_json
from s1jax.model.hf_names import Index, TensorLayout, tensor_layouts
from s1jax.model.qwen import Params, Qwen

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_BLOCK_BYTES = 2**25
"""What is read, cast and transposed at a time."""
_ALIGNMENT = 64
"""Of arrays on a CPU, in bytes."""
_HUGE_PAGE = 2**21
_READERS = 2
"""Threads that read: more hold more blocks in memory, and two already wait for the same memory or disk."""
_MAX_FILE_BYTES = 5_000_000_000


class CheckpointError(ValueError):
    """A model directory that cannot be read as it is, or could not be written; the message lists every problem."""

    def __init__(self, directory: Path | str, problems: list[str]):
        super().__init__(f"{directory}:\n" + "\n".join(f"  - {problem}" for problem in problems))


class _Stored(NamedTuple):
    """A tensor in a file: where its bytes begin, its shape, and its dtype as safetensors calls it."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


def resolve_model(path: str) -> Path:
    """The local directory of a model: `path` itself, or the download of the hub id that it names.

    Raises FileNotFoundError if it is neither.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        patterns = ["*.safetensors", _INDEX_FILE, "config.json", "generation_config.json", *_TOKENIZER_FILES]
        try:
            return Path(snapshot_download(path, allow_patterns=patterns))
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(f"{path}: no such directory, and as a hub id: {error}") from None
    raise FileNotFoundError(f"{path}: no such directory (a hub id is written owner/name)")


def stored_dtypes(directory: Path) -> set[str]:
    """The dtypes of a checkpoint's tensors, as safetensors calls them. Raises CheckpointError if it cannot be read."""
    return {tensor.dtype for tensor in _find(directory).values()}


def load_params(directory: Path, model: Qwen, mesh: Mesh, *, stacked: bool = True) -> Params:
    """Read a checkpoint into arrays sharded over the mesh, cast to `model.param_dtype`; layers stacked or unrolled.

    Raises CheckpointError with all that is wrong with the directory, MeshError if the model does not fit the mesh.
    """
    stored = _check(directory, model)
    abstract = model.abstract_params(mesh, stacked=stacked)
    layouts = tensor_layouts(model.config, stacked=stacked)
    params: Params = {}
    with ThreadPoolExecutor(_READERS) as readers:
        arrays = readers.map(lambda layout: _read(layout, _get(abstract, layout.path), stored), layouts)
        for layout, array in zip(layouts, arrays, strict=True):
            _set(params, layout.path, array)
    return params


def _read(layout: TensorLayout, leaf: jax.ShapeDtypeStruct, tensors: dict[str, _Stored]) -> jax.Array:
    layer_shape = leaf.shape[1:] if layout.per_layer else leaf.shape

    def fill(out: np.ndarray, name: str, index: Index) -> None:
        tensor = tensors[name]
        if layout.as_stored and out.dtype == _DTYPES[tensor.dtype] and out.size == math.prod(tensor.shape):
            _read_bytes(tensor, out)
            return
        # Opened for each tensor: a map kept open would hold every page that was ever read in memory.
        with safe_open(tensor.path, framework="np") as file:
            stored = file.get_slice(name)
            for block, here in _blocks(layout, index, out):
                part = stored[layout.hf_index(block, layer_shape)]
                if layout.as_stored:
                    _cast(part, out[here].reshape(part.shape))
                else:
                    # Cast before transposing: converting strided bfloat16 is several times slower.
                    cast = part if part.dtype == out.dtype else _cast(part, np.empty(part.shape, out.dtype))
                    out[here] = layout.from_hf(cast, out[here].shape)

    def shard(index: Index | None) -> np.ndarray:
        index = index or ()
        spans = [cut.indices(size) for cut, size in zip(index, leaf.shape, strict=True)]
        out = _aligned([stop - start for start, stop, _ in spans], leaf.dtype)
        if layout.per_layer:
            for i, layer in enumerate(range(*spans[0])):
                fill(out[i], layout.name.format(layer), index[1:])
        else:
            fill(out, layout.name, index)
        return out

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard)


def _read_bytes(tensor: _Stored, out: np.ndarray) -> None:
    """Read a whole tensor to where it stays, four times as fast as through safetensors' mapped file."""
    left = memoryview(out.reshape(-1).view(np.uint8).data)
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        while left and (count := file.readinto(left)):
            left = left[count:]
    if left:
        raise CheckpointError(tensor.path, ["ends before its tensors do"])


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins where a CPU's device wants it: it is then taken over as it is, not copied.

    Whole huge pages of it are asked for as such: the system finds them several times faster.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    huge = nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    alignment = _HUGE_PAGE if huge else _ALIGNMENT
    pages = mmap.mmap(-1, nbytes + alignment)
    memory = np.frombuffer(pages, np.uint8)
    start = -memory.ctypes.data % alignment
    if huge:
        with suppress(OSError):  # Of a kernel that has none.
            pages.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _HUGE_PAGE * _HUGE_PAGE)
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _cast(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    if values.dtype == jnp.bfloat16 and out.dtype == np.float32:
        # A bfloat16 is the upper half of a float32; numpy's own conversion takes one number at a time.
        np.left_shift(values.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, values, casting="unsafe")
    return out


def _blocks(layout: TensorLayout, index: Index, out: np.ndarray) -> Iterator[tuple[Index, Index]]:
    """Cut what is to be read along the tensor's first stored dimension: parts of the parameter, and where in `out`."""
    dimension = layout.groups[0][0]
    offset = index[dimension].start or 0
    rows = max(1, _BLOCK_BYTES * out.shape[dimension] // max(out.nbytes, 1))
    for start in range(0, out.shape[dimension], rows):
        stop = min(start + rows, out.shape[dimension])
        block, here = list(index), [slice(None)] * out.ndim
        block[dimension], here[dimension] = slice(offset + start, offset + stop), slice(start, stop)
        yield tuple(block), tuple(here)


def _check(directory: Path, model: Qwen) -> dict[str, _Stored]:
    """Every tensor that the model needs; raises CheckpointError with everything that is amiss."""
    problems: list[str] = []
    found = _find(directory)
    wanted = _expected_shapes(model)
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # Some tied checkpoints carry the copy; transformers ignores it too.
    problems += [f"missing tensor {name}" for name in wanted if name not in found]
    problems += [f"unexpected tensor {name}" for name in sorted(set(found) - set(wanted) - ignored)]
    for name, shape in wanted.items():
        if name not in found:
            continue
        stored = found[name]
        if stored.shape != shape:
            problems.append(f"{name} has shape {list(stored.shape)}, config.json implies {list(shape)}")
        if stored.dtype not in _DTYPES:
            problems.append(f"{name} is stored as {stored.dtype}; expected one of {', '.join(sorted(_DTYPES))}")
    if problems:
        raise CheckpointError(directory, problems)
    return {name: found[name] for name in wanted}


def _find(directory: Path) -> dict[str, _Stored]:
    """Every tensor that is there; raises CheckpointError with every file that is amiss."""
    problems: list[str] = []
    found: dict[str, _Stored] = {}
    for path, expected in _weight_files(directory, problems):
        try:
            with safe_open(path, framework="np") as file:
                names = set(file.keys())
                offsets = _offsets(path)
                for name in names:
                    tensor = file.get_slice(name)
                    found[name] = _Stored(path, offsets[name], tuple(tensor.get_shape()), tensor.get_dtype())
        except FileNotFoundError:
            problems.append(f"{path.name}: no such file")
            continue
        except (SafetensorError, OSError) as error:
            problems.append(f"{path.name}: not a whole safetensors file ({error})")
            continue
        problems += [f"{path.name}: the index places {name} here, but it is not" for name in sorted(expected - names)]
    if problems:
        raise CheckpointError(directory, problems)
    return found


def _offsets(path: Path) -> dict[str, int]:
    """Where the bytes of each tensor of a safetensors file begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _weight_files(directory: Path, problems: list[str]) -> list[tuple[Path, set[str]]]:
    """Each safetensors file of the checkpoint with the tensors that the index places in it."""
    if (directory / _SINGLE_FILE).exists():
        return [(directory / _SINGLE_FILE, set())]
    index = directory / _INDEX_FILE
    if not index.exists():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        problem = f"no {_SINGLE_FILE} and no {_INDEX_FILE}"
        if pickles:
            problem += f"; pickle files ({', '.join(pickles)}) can run code and are not read: convert them first"
        problems.append(problem)
        return []
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{_INDEX_FILE}: not an index with a weight_map ({error!r})")
        return []
    outside = sorted(file for file in by_file if Path(file).is_absolute() or ".." in Path(file).parts)
    problems += [f"{_INDEX_FILE}: names {file}, outside the directory" for file in outside]
    return [(directory / file, names) for file, names in sorted(by_file.items()) if file not in outside]


def _expected_shapes(model: Qwen) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint, in the order of the layers."""
    abstract = model.abstract_params()
    shapes = {}
    for layout, layer in _tensors(model):
        shape = _get(abstract, layout.path).shape
        shapes[layout.name.format(layer)] = layout.hf_shape(shape[1:] if layout.per_layer else shape)
    return shapes


def _tensors(model: Qwen) -> Iterator[tuple[TensorLayout, int]]:
    """Every stored tensor as its layout and layer (0 where there is but one), layers together."""
    layouts = tensor_layouts(model.config)
    yield from ((layout, 0) for layout in layouts if not layout.per_layer)
    for layer in range(model.config.num_hidden_layers):
        yield from ((layout, layer) for layout in layouts if layout.per_layer)


def export_model(
    directory: Path,
    model: Qwen,
    params: Params,
    *,
    source: Path | None = None,
    dtype: DTypeLike | None = None,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> None:
    """Write a directory that transformers and vLLM load; all processes take part, the first one writes.

    `source` is the model directory that the configuration and the tokenizer files come from. `dtype` is what the
    weights are stored as (default: as they are). Raises CheckpointError if `directory` exists or cannot be written;
    then nothing stands under that name.
    """
    if directory.exists():
        raise CheckpointError(directory, ["already exists; choose another name or remove it"])
    writer = jax.process_index() == 0
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _write_weights(partial if writer else None, model, params, np.dtype(dtype or model.param_dtype), max_file_bytes)
        if writer:
            _write_texts(partial, model, source, np.dtype(dtype or model.param_dtype))
            _sync(partial)
            partial.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(directory, [f"could not be written: {error}"]) from error
    multihost_utils.sync_global_devices(f"exported {directory}")


def _write_weights(directory: Path | None, model: Qwen, params: Params, dtype: np.dtype, max_file_bytes: int) -> None:
    shapes = _expected_shapes(model)
    files: list[list[tuple[TensorLayout, int]]] = [[]]
    size = total = 0
    for layout, layer in _tensors(model):
        nbytes = int(np.prod(shapes[layout.name.format(layer)])) * dtype.itemsize
        if files[-1] and size + nbytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append((layout, layer))
        size += nbytes
        total += nbytes
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        name = _SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        content = {}
        for layout, layer in tensors:
            array = _get(params, layout.path)
            host = _to_host(array[layer] if layout.per_layer else array)
            if directory:
                content[layout.name.format(layer)] = layout.to_hf(host.astype(dtype, copy=False))
        weight_map.update(dict.fromkeys(content, name))
        if directory:
            save_file(content, directory / name, metadata={"format": "pt"})
    if directory and len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _write_texts(directory: Path, model: Qwen, source: Path | None, dtype: np.dtype) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    config: dict[str, Any] = read_config_json(source) if source else model.config.to_hf()
    # Both names of it: transformers 5 reads the first, version 4 and vLLM the second.
    config["dtype"] = config["torch_dtype"] = jnp.dtype(dtype).name
    _write_json(directory / "config.json", config)
    generation = source / "generation_config.json" if source else None
    if generation and generation.is_file():
        shutil.copyfile(generation, directory / generation.name)
    else:
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(directory / "generation_config.json", {k: v for k, v in config.items() if k in special})
    for name in _TOKENIZER_FILES:
        if source and (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(directory: Path) -> None:
    """Have the disk hold the files before they get their final name."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _get(tree: dict[Any, Any], path: tuple[str | int, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _set(tree: dict[Any, Any], path: tuple[str | int, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
