"""Which files a Hugging Face directory consists of, and which tensors they hold."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from s1jax.model.hf_names import is_quantised
from s1jax.model.safetensors_files import CheckpointError, StoredTensor, read_header
from s1jax.paths import AnyPath, BucketPath, any_path
from s1jax.strict_json import parse_json
from s1jax.tokenizer import TOKENIZER_FILES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_FILE_NAME = re.compile(r"[^\x00-\x1f\ud800-\udfff]{1,255}")
_READERS = 8
"""Of a bucket, each waits for an answer of its own."""


def resolve_model(path: str) -> AnyPath:
    """The directory of a model: `path` itself, or the download of the hub id that it names.

    Raises FileNotFoundError if it is neither, PathError or another OSError if it cannot be looked at.
    """
    return _resolve(path, ["*.safetensors", INDEX_FILE, "config.json", "generation_config.json", *TOKENIZER_FILES])


def resolve_adapter(path: str) -> AnyPath:
    """The directory of an adapter, as `resolve_model`."""
    return _resolve(path, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])


def _resolve(path: str, patterns: list[str]) -> AnyPath:
    directory = any_path(path)
    if directory.is_dir():
        return directory
    if isinstance(directory, BucketPath):
        raise FileNotFoundError(f"{path}: no objects below this name")
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        try:
            return Path(snapshot_download(path, allow_patterns=patterns))
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(f"{path}: no such directory, and as a hub id: {error}") from None
    raise FileNotFoundError(f"{path}: no such directory (a hub id is written owner/name)")


def stored_dtypes(directory: AnyPath, *, quantised: bool = False) -> set[str]:
    """The dtypes of a checkpoint's tensors, as safetensors calls them; `quantised`: of those that stay as they are.

    Raises CheckpointError if it cannot be read.
    """
    return {tensor.dtype for name, tensor in find_tensors(directory).items() if not (quantised and is_quantised(name))}


def find_tensors(directory: AnyPath) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name; raises CheckpointError with every file that is amiss."""
    problems: list[str] = []
    found: dict[str, StoredTensor] = {}
    files = _weight_files(directory, problems)
    with ThreadPoolExecutor(_READERS) as readers:
        headers = [readers.submit(read_header, path) for path, _ in files]
    for (path, expected), header in zip(files, headers, strict=True):
        try:
            names = header.result()
        except FileNotFoundError:
            problems.append(f"{path.name}: no such file")
            continue
        except ValueError as error:
            problems.append(f"{path.name}: not a whole safetensors file ({error})")
            continue
        except OSError as error:
            problems.append(f"{path.name}: cannot be read ({error})")
            continue
        problems += [
            f"{path.name}: holds {name:.100}, as {found[name].path.name} does" for name in names if name in found
        ]
        found.update(names)
        problems += [
            f"{path.name}: the index places {name:.100} here, but it is not" for name in sorted(expected - names.keys())
        ]
    if problems:
        raise CheckpointError(directory, problems)
    return found


def _weight_files(directory: AnyPath, problems: list[str]) -> list[tuple[AnyPath, set[str]]]:
    """Each safetensors file of the checkpoint with the tensors that the index places in it."""
    if (directory / SINGLE_FILE).exists():
        return [(directory / SINGLE_FILE, set())]
    index = directory / INDEX_FILE
    if not index.exists():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        problem = f"no {SINGLE_FILE} and no {INDEX_FILE}"
        if pickles:
            problem += f"; pickle files ({', '.join(pickles)}) can run code and are not read: convert them first"
        problems.append(problem)
        return []
    try:
        content = parse_json(index.read_bytes())
    except ValueError as error:
        problems.append(f"{INDEX_FILE}: {error}")
        return []
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        problems.append(f"{INDEX_FILE}: expected an object with a weight_map, which says in which file each tensor is")
        return []
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            problems.append(f"{INDEX_FILE}: {name:.100} is placed in {file!r:.100}, expected the name of a file")
            return []
        by_file.setdefault(file, set()).add(name)
    outside = sorted(file for file in by_file if file.startswith("/") or ".." in PurePosixPath(file).parts)
    problems += [f"{INDEX_FILE}: names {file:.100}, outside the directory" for file in outside]
    return [(directory / file, names) for file, names in sorted(by_file.items()) if file not in outside]
