"""Weights from Hugging Face directories to sharded arrays.

The whole directory is checked first, then each process reads the rows of which its devices hold a part, once for all
of them, block by block.
"""

import math
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from s1jax.model.adapter import MergedTensor, read_adapter
from s1jax.model.config import QwenConfig
from s1jax.model.hf_files import find_tensors
from s1jax.model.hf_names import EMBEDDING, HEAD, Index, TensorLayout, quantised_as, scale_name, tensor_layouts
from s1jax.model.quantisation import PackedTensor, QuantisedTensor, Quantiser, from_stored, stored_integers
from s1jax.model.qwen import Params, Qwen
from s1jax.model.safetensors_files import DTYPES, FLOATS, CheckpointError, StoredTensor
from s1jax.paths import AnyPath, BucketPath

_BLOCK_BYTES = 2**25
"""What is read, cast and transposed at a time."""
_ALIGNMENT = 64
"""Of arrays on a CPU, in bytes."""
_HUGE_PAGE = 2**21
_READERS = 2
"""Threads that read: more hold more blocks in memory, and two already wait for the same memory or disk."""
_BUCKET_READERS = 8
"""Of a bucket, each waits for an answer of its own."""

_Spans = tuple[tuple[int, int], ...]
"""Of each dimension, where a part begins and ends."""


class _Piece(NamedTuple):
    """A part of one layer's parameter, and the array that takes it."""

    spans: _Spans
    out: np.ndarray


Tensor = StoredTensor | MergedTensor | QuantisedTensor | PackedTensor
"""What a parameter is read from."""
_Run = Callable[[Iterable[Callable[[], None]]], None]


def check_sizes(directory: AnyPath, config: QwenConfig) -> None:
    """Compare depth, width and vocabulary with the checkpoint's tensors, before anything of such a size is built.

    Raises CheckpointError if they differ, or the checkpoint cannot be read.
    """
    _compare_sizes(directory, config, find_tensors(directory))


def _compare_sizes(directory: AnyPath, config: QwenConfig, found: dict[str, StoredTensor]) -> None:
    layers = {match[1] for name in found if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if config.num_hidden_layers > len(layers):
        problem = f"config.json has num_hidden_layers {config.num_hidden_layers}, there are tensors of {len(layers)}"
        raise CheckpointError(directory, [problem])
    name, shape = EMBEDDING, (config.vocab_size, config.hidden_size)
    if kind := quantised_as(name, config.quantisation):
        shape = stored_integers(kind, shape).shape
    if name in found and found[name].shape != shape:
        problem = f"{name} has shape {list(found[name].shape)}, config.json implies {list(shape)}"
        raise CheckpointError(directory, [problem])


def checkpoint_tensors(directory: AnyPath, model: Qwen, adapter: AnyPath | None = None) -> dict[str, Tensor]:
    """Everything that the parameters of a model are read from, by name; only headers are read for it.

    The adapter in another directory is merged; then weights are quantised, if the model's are and the checkpoint's are
    not.
    Raises CheckpointError with all that is wrong with a directory.
    """
    already = model.config.quantisation
    found = _check(directory, model)
    if already:
        assert already == model.quantisation
        assert adapter is None
        shapes = expected_shapes(model, tensor_layouts(model.config))
        kinds = {name: kind for name in shapes if (kind := quantised_as(name, already))}
        return {**found, **{name: from_stored(found[name], kinds[name], shapes[name]) for name in kinds}}
    whole: dict[str, StoredTensor | MergedTensor] = {**found, **(read_adapter(adapter, found) if adapter else {})}
    tensors: dict[str, Tensor] = {**whole}
    for name in whole:
        if kind := quantised_as(name, model.quantisation):
            made = Quantiser(whole[name], kind)
            tensors[name] = QuantisedTensor(made, of_scales=False)
            tensors[scale_name(name)] = QuantisedTensor(made, of_scales=True)
    return tensors


def load_params(
    directory: AnyPath, model: Qwen, mesh: Mesh, *, stacked: bool = True, adapter: AnyPath | None = None
) -> Params:
    """Read a checkpoint into arrays sharded over the mesh, in the model's dtypes; layers stacked or unrolled.

    The adapter in another directory is merged into them; a model's own adapters are not among them.
    Raises CheckpointError with all that is wrong with a directory, MeshError if the model does not fit the mesh.
    """
    tensors = checkpoint_tensors(directory, model, adapter)
    abstract = model.abstract_params(mesh, stacked=stacked)
    layouts = tensor_layouts(model.config, stacked=stacked, scales=model.quantisation is not None)
    params: Params = {}
    with ThreadPoolExecutor(_READERS) as readers, _reading(directory) as run:
        arrays = readers.map(lambda layout: _read(layout, get_at(abstract, layout.path), tensors, run), layouts)
        for layout, array in zip(layouts, arrays, strict=True):
            _set(params, layout.path, array)
    _check_finite(directory, model, layouts, params, mesh)
    return params


def _check_finite(directory: AnyPath, model: Qwen, layouts: list[TensorLayout], params: Params, mesh: Mesh) -> None:
    """Raise CheckpointError that names the first tensor with a NaN or an infinite weight on this process's devices.

    Each device answers for its own part, since no process may wait for another while it reads.
    """

    @partial(jax.jit, static_argnums=(1, 2))
    def finite(array: jax.Array, spec: PartitionSpec, per_layer: bool) -> jax.Array:
        def of_part(part: jax.Array) -> jax.Array:
            return jnp.isfinite(part).all(axis=tuple(range(per_layer, part.ndim)))[None]

        every_device = PartitionSpec(mesh.axis_names)
        return jax.shard_map(of_part, mesh=mesh, in_specs=spec, out_specs=every_device, check_vma=False)(array)

    arrays = [get_at(params, layout.path) for layout in layouts]
    answers = [
        finite(array, array.sharding.spec, layout.per_layer) for array, layout in zip(arrays, layouts, strict=True)
    ]
    bad = {
        layout.name.format(layer).removesuffix(scale_name(""))
        for layout, answer in zip(layouts, answers, strict=True)
        for shard in answer.addressable_shards
        for layer in np.flatnonzero(~np.asarray(shard.data).reshape(-1))
    }
    if bad:
        names = expected_shapes(model, tensor_layouts(model.config))
        first = next(name for name in names if name in bad)
        others = f" and {len(bad) - 1} other tensors" if len(bad) > 1 else ""
        raise CheckpointError(directory, [f"NaN or infinite weights in {first}{others}"])


@contextmanager
def _reading(directory: AnyPath) -> Iterator[_Run]:
    """What carries out the readings of a parameter: in turn from a disk, several at a time from a bucket."""

    def in_turn(readings: Iterable[Callable[[], None]]) -> None:
        for read in readings:
            read()

    if not isinstance(directory, BucketPath):
        yield in_turn
        return
    with ThreadPoolExecutor(_BUCKET_READERS) as pool:

        def at_once(readings: Iterable[Callable[[], None]]) -> None:
            for _ in pool.map(lambda read: read(), readings):
                pass

        yield at_once


def _read(layout: TensorLayout, leaf: jax.ShapeDtypeStruct, tensors: dict[str, Tensor], run: _Run) -> jax.Array:
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    parts = {
        spans: _aligned([stop - start for start, stop in spans], leaf.dtype)
        for spans in {_spans(index, leaf.shape) for index in indices}
    }
    run(_readings(layout, leaf.shape, tensors, parts))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[_spans(index, leaf.shape)])


def _spans(index: Index | None, shape: tuple[int, ...]) -> _Spans:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index or [slice(None)] * len(shape), shape, strict=True))


def _readings(
    layout: TensorLayout, shape: tuple[int, ...], tensors: dict[str, Tensor], parts: dict[_Spans, np.ndarray]
) -> Iterator[Callable[[], None]]:
    """Readings that together fill these parts of a parameter, each of one block of rows for all that need them."""
    layer_shape = shape[1:] if layout.per_layer else shape
    dimension = layout.groups[0][0]
    for layer in range(shape[0] if layout.per_layer else 1):
        tensor = tensors[layout.name.format(layer)]
        by_rows: dict[tuple[int, int], list[_Piece]] = {}
        for spans, out in parts.items():
            piece = _Piece(spans[1:], out[layer]) if layout.per_layer else _Piece(spans, out)
            by_rows.setdefault(piece.spans[dimension], []).append(piece)
        step = max(1, _BLOCK_BYTES * layer_shape[dimension] // (tensor.shape[0] * tensor.row_bytes))
        for (first, last), pieces in by_rows.items():
            for start in range(first, last, step):
                yield partial(_read_block, layout, layer_shape, tensor, pieces, start, min(start + step, last))


def _read_block(
    layout: TensorLayout, shape: tuple[int, ...], tensor: Tensor, pieces: list[_Piece], start: int, stop: int
) -> None:
    """Read the tensor's rows from `start` up to `stop`, counted in our dimension, and put each piece where it goes."""
    dimension = layout.groups[0][0]
    rows_each = tensor.shape[0] // shape[dimension]
    first, last = start * rows_each, stop * rows_each
    targets = []
    for spans, out in pieces:
        here = [slice(None)] * out.ndim
        here[dimension] = slice(start - spans[dimension][0], stop - spans[dimension][0])
        targets.append(out[tuple(here)])
    if layout.as_stored and len(targets) == 1 and isinstance(tensor, StoredTensor):
        whole = targets[0].nbytes == (last - first) * tensor.row_bytes and targets[0].dtype == DTYPES[tensor.dtype]
        if whole:
            tensor.read_rows(first, last, targets[0])
            return
    block = tensor.read_rows(first, last)
    for (spans, _), target in zip(pieces, targets, strict=True):
        columns = layout.hf_index(tuple(slice(*span) for span in spans), shape)[1:]
        part = block[:, *columns]
        if layout.as_stored:
            _cast(part, target.reshape(part.shape))
        else:
            # Cast before transposing: converting strided bfloat16 is several times slower.
            cast = part if part.dtype == target.dtype else _cast(part, np.empty(part.shape, target.dtype))
            target[...] = layout.from_hf(cast, target.shape)


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


def _check(directory: AnyPath, model: Qwen) -> dict[str, StoredTensor]:
    """Every tensor that the model needs; raises CheckpointError with everything that is amiss."""
    problems: list[str] = []
    found = find_tensors(directory)
    _compare_sizes(directory, model.config, found)
    already = model.config.quantisation
    wanted = expected_shapes(model, tensor_layouts(model.config, scales=already is not None))
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings:
        ignored.add(HEAD)  # Some tied checkpoints carry the copy.
    problems += [f"missing tensor {name}" for name in wanted if name not in found]
    problems += [f"unexpected tensor {name:.200}" for name in sorted(set(found) - set(wanted) - ignored)]
    for name, shape in wanted.items():
        if name not in found:
            continue
        stored, dtypes = found[name], FLOATS
        if kind := quantised_as(name, already):
            integers = stored_integers(kind, shape)
            shape, dtypes = integers.shape, {n: dtype for n, dtype in DTYPES.items() if dtype == integers.dtype}
        if stored.shape != shape:
            problems.append(f"{name} has shape {list(stored.shape)}, config.json implies {list(shape)}")
        if stored.dtype not in dtypes:
            problems.append(f"{name} is stored as {stored.dtype:.40}; expected one of {', '.join(sorted(dtypes))}")
    if not problems and HEAD in found and HEAD in ignored and not _same(found[HEAD], found[EMBEDDING]):
        problems.append(
            f"{HEAD} differs from {EMBEDDING}, though config.json has tie_word_embeddings true: "
            "set it to false to use the head as it is, or remove the tensor"
        )
    if problems:
        raise CheckpointError(directory, problems)
    return {name: found[name] for name in wanted}


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, read block by block up to the first that differ."""
    if one.shape != other.shape or one.dtype not in FLOATS:
        return False
    step = max(1, _BLOCK_BYTES // max(one.row_bytes, other.row_bytes))
    spans = [(start, min(start + step, one.shape[0])) for start in range(0, one.shape[0], step)]
    # As bytes where they are of one dtype: a NaN is the same as its copy, and is refused by its own name.
    as_bytes = one.dtype == other.dtype

    def numbers(tensor: StoredTensor, span: tuple[int, int]) -> np.ndarray:
        rows = tensor.read_rows(*span)
        return rows.view(np.uint8) if as_bytes else rows.astype(np.float32)

    return all(np.array_equal(numbers(one, span), numbers(other, span)) for span in spans)


def expected_shapes(model: Qwen, layouts: list[TensorLayout]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that these parameters are stored as, in the order of `stored_tensors`."""
    abstract = model.abstract_params()
    shapes = {}
    for layout, layer in stored_tensors(model, layouts):
        shape = get_at(abstract, layout.path).shape
        shapes[layout.name.format(layer)] = layout.hf_shape(shape[1:] if layout.per_layer else shape)
    return shapes


def stored_tensors(model: Qwen, layouts: list[TensorLayout]) -> Iterator[tuple[TensorLayout, int]]:
    """Every tensor of stacked parameters as its layout and layer (0 where there is but one), layers together."""
    yield from ((layout, 0) for layout in layouts if not layout.per_layer)
    for layer in range(model.config.num_hidden_layers):
        yield from ((layout, layer) for layout in layouts if layout.per_layer)


def get_at(tree: dict[Any, Any], path: tuple[str | int, ...]) -> Any:
    """What a nested dict holds at this path."""
    for name in path:
        tree = tree[name]
    return tree


def _set(tree: dict[Any, Any], path: tuple[str | int, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
