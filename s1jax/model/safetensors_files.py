"""Tensors of safetensors files, on disks and in buckets, read and written by ranges of bytes.

A file is 8 bytes with the length of its header, the header in JSON, and the bytes of one tensor after another
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s1jax.paths import AnyPath, BucketPath, file_size, read_range
from s1jax.strict_json import parse_json

FLOATS: dict[str, np.dtype] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
DTYPES: dict[str, np.dtype] = {**FLOATS, "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}
"""Of the tensors that are read and written here, by the names that safetensors has for them."""
_HEADER_BYTES = 2**17
"""What is read of a file at first: most headers are shorter."""
_MOST_HEADER_BYTES = 100_000_000
"""As in the format's own library."""
_MOST_BYTES = 2**60
"""Of a tensor, and of each of its dimensions: what is more is no size."""
_MOST_DIMENSIONS = 32


class CheckpointError(ValueError):
    """A model directory that cannot be read as it is, or could not be written; the message lists every problem."""

    def __init__(self, directory: AnyPath | str, problems: list[str]):
        super().__init__(f"{directory}:\n" + "\n".join(f"  - {problem}" for problem in problems))


class StoredTensor(NamedTuple):
    """A tensor in a file: where its bytes begin and end, its shape, and its dtype as safetensors calls it."""

    path: AnyPath
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Of one index of the first dimension."""
        return (self.stop - self.start) // self.shape[0]

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows from `start` up to `stop`, read into `out` (contiguous, of the tensor's dtype) if it is given.

        Raises OSError, or CheckpointError if the file ends before them.
        """
        begin, wanted = self.start + start * self.row_bytes, (stop - start) * self.row_bytes
        if out is None and isinstance(self.path, BucketPath):
            content = np.frombuffer(self.path.read_range(begin, begin + wanted), np.uint8)
            count = content.size
        else:
            content = np.empty(wanted, np.uint8) if out is None else out.reshape(-1).view(np.uint8)
            count = read_range(self.path, begin, content.data)
        if count < wanted:
            raise CheckpointError(self.path, ["ends before its tensors do"])
        return content.view(DTYPES[self.dtype]).reshape(stop - start, *self.shape[1:])


def read_header(path: AnyPath) -> dict[str, StoredTensor]:
    """Every tensor of a file by its name.

    Raises OSError, or ValueError that says why this is not a whole safetensors file.
    """
    size = file_size(path)
    first = bytearray(min(size, _HEADER_BYTES))
    read_range(path, 0, memoryview(first))
    length = int.from_bytes(first[:8], "little")
    if size < 8 or 8 + length > size or length > _MOST_HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
    if 8 + length > len(first):
        rest = bytearray(8 + length - len(first))
        read_range(path, len(first), memoryview(rest))
        first += rest
    header = parse_json(bytes(first[8 : 8 + length]))
    if not isinstance(header, dict):
        raise ValueError(f"a header that does not describe tensors: {header!r:.40}")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"a header with the __metadata__ {metadata!r:.40}, expected texts by name")
    tensors = {name: _stored(path, 8 + length, name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(f"{name:.100}: begins at byte {tensor.start:,}, what is before it ends at {end:,}")
        end = tensor.stop
    if end != size:
        raise ValueError(f"{size:,} bytes, {end:,} by its header")
    return tensors


def _stored(path: AnyPath, begin: int, name: str, entry: Any) -> StoredTensor:
    """What a header says of a tensor of a file whose tensors begin at this byte."""
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = (entry.get(key) for key in ("shape", "data_offsets", "dtype"))
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and isinstance(dtype, str)):
        raise ValueError(f"a header that does not describe tensors: {name:.100} has {entry!r:.100}")
    start, stop = offsets
    # Of a dtype that is not read here, the sizes are not known.
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else max(0, stop - start)
    if nbytes != stop - start:
        raise ValueError(f"{name:.100}: {stop - start:,} bytes, {nbytes:,} by its shape")
    return StoredTensor(path, begin + start, begin + stop, tuple(shape), dtype)


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < _MOST_BYTES for value in values)


def make_file(tensors: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[bytearray, dict[str, np.ndarray]]:
    """The bytes of a file with tensors of these shapes and dtypes, and each tensor within it, still to be filled."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + num_bytes(tensor)
        header[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = bytearray(8 + len(text) + offset)
    content[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
    places, at = {}, 8 + len(text)
    for name, tensor in tensors.items():
        whole = np.frombuffer(content, np.uint8, num_bytes(tensor), at)
        places[name] = whole.view(tensor.dtype).reshape(tensor.shape)
        at += whole.nbytes
    return content, places


def num_bytes(tensor: jax.ShapeDtypeStruct) -> int:
    """Of a tensor in a file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
