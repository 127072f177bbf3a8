"""What a model's files hold, in a few bytes: by which a result is known to be this model's."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from s1jax.config import ModelSection
from s1jax.model.hf_files import ADAPTER_CONFIG, INDEX_FILE, resolve_adapter, resolve_model
from s1jax.paths import AnyPath, BucketPath, file_size, read_range
from s1jax.tokenizer import TOKENIZER_FILES

_DECIDING = {INDEX_FILE, ADAPTER_CONFIG, "config.json", "generation_config.json", *TOKENIZER_FILES}
_WHOLE_BYTES = 2**26
"""Files up to this size are read whole."""
_PIECES, _PIECE_BYTES = 1024, 2**12
"""Of a larger file, so many pieces, from its first byte to its last, of so many bytes."""
_READERS = 16


def model_fingerprint(section: ModelSection) -> dict[str, str]:
    """`fingerprint` of the directories that a configuration names. Raises OSError."""
    found = fingerprint(resolve_model(section.path))
    if section.adapter:
        adapter = fingerprint(resolve_adapter(section.adapter))
        found |= {f"adapter/{name}": digest for name, digest in adapter.items()}
    return found


def fingerprint(directory: AnyPath) -> dict[str, str]:
    """Of every file that decides what the model says, by its name: its size, and a digest of bytes all over it.

    Raises OSError.
    """
    files = sorted(f for f in directory.iterdir() if f.suffix == ".safetensors" or f.name in _DECIDING)
    with ThreadPoolExecutor(_READERS) as pool:
        return {file.name: found for file, found in zip(files, pool.map(_digest, files), strict=True)}


def _digest(file: AnyPath) -> str:
    if isinstance(file, BucketPath):
        return file.checksum()
    size, digest = file_size(file), hashlib.sha256()
    last = size - _PIECE_BYTES
    pieces = [(last * i // (_PIECES - 1), _PIECE_BYTES) for i in range(_PIECES)]
    for start, length in [(0, size)] if size <= _WHOLE_BYTES else pieces:
        piece = bytearray(length)
        read_range(file, start, memoryview(piece))
        digest.update(piece)
    return f"{size} {digest.hexdigest()}"
