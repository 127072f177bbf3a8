"""Paths that a person gives: local ones, gs:// and s3://.

They go through `any_path`. What is written here is there whole or not at all, on a disk as in a bucket.
"""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from s1jax.bucket_path import BucketPath, PathError

BUCKET_SCHEMES = ("gs", "s3")
_AS_BEFORE = "it is as it was before"


class WriteError(OSError):
    """What could not be written; the message names the file, the reason, and what of it is intact."""

    def __init__(self, path: "AnyPath", error: OSError, intact: str):
        """`intact` is a clause that follows the reason."""
        super().__init__(f"{path}: {error.strerror or error}; {intact}")


AnyPath = Path | BucketPath


def any_path(text: str | AnyPath) -> AnyPath:
    """The path that a person wrote: local (~ is the home directory), gs://BUCKET/NAME or s3://BUCKET/NAME.

    Raises PathError for any other scheme.
    """
    if not isinstance(text, str):
        return text
    scheme, separator, key = text.partition("://")
    if not separator:
        return Path(os.path.expanduser(text))  # Leaves ~nobody as it is, where pathlib raises.
    if scheme not in BUCKET_SCHEMES:
        known = " and ".join(f"{name}://" for name in BUCKET_SCHEMES)
        raise PathError(f"{text}: {scheme}:// is not known; paths are local, or begin with {known}")
    if not key.strip("/"):
        raise PathError(f"{text}: expected {scheme}://BUCKET/NAME")
    return BucketPath(scheme, key.strip("/"))


def write_whole(path: AnyPath, content: str | bytes | bytearray) -> None:
    """Replace a file by this content; a reader, or a later start, finds all of it or what was there before.

    Raises WriteError, which leaves the file as it was.
    """
    content = content.encode("utf-8") if isinstance(content, str) else content
    if isinstance(path, Path):
        with replacing(path) as file:
            file.write(content)
        return
    try:
        path.write_bytes(content)
    except OSError as error:
        raise WriteError(path, error, _AS_BEFORE) from None


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[BinaryIO]:
    """A file to write what is too large for memory, as `write_whole` does; it is there when the block has ended.

    What the block raises leaves the file as it was. Raises WriteError.
    """
    if isinstance(path, BucketPath):
        partial = Path(tempfile.gettempdir(), f"s1jax-{secrets.token_hex(8)}")
    else:
        partial = path.with_name(f".{path.name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if isinstance(path, BucketPath):
            path.upload(partial)
        else:
            partial.replace(path)
    except OSError as error:
        if error.filename not in (None, str(partial), str(partial.parent), str(path)):
            raise  # Of what the block reads.
        raise WriteError(path, error, _AS_BEFORE) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read_range(path: AnyPath, start: int, out: memoryview) -> int:
    """Fill `out` with the file's bytes from `start` on; returns how many there were."""
    if isinstance(path, BucketPath):
        content = path.read_range(start, start + len(out))
        out[: len(content)] = content
        return len(content)
    done = 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while done < len(out) and (count := file.readinto(out[done:])):
            done += count
    return done


def read_start(path: AnyPath, count: int) -> bytes:
    """The file's first bytes, `count` of them or all there are; a pipe's and a device's too."""
    if isinstance(path, BucketPath):
        # Not a range where there is nothing: some stores refuse that.
        return path.read_range(0, count) if path.size() else b""
    with path.open("rb") as file:
        return file.read(count)


def file_size(path: AnyPath) -> int:
    """Bytes of a file or object."""
    return path.size() if isinstance(path, BucketPath) else path.stat().st_size


def files_below(path: AnyPath) -> list[AnyPath]:
    """Every file below a directory, sorted; nothing if there is no such directory."""
    if isinstance(path, BucketPath):
        return list(path.files_below())
    return sorted(p for p in path.rglob("*") if p.is_file())


def remove_tree(path: AnyPath) -> None:
    """Remove a directory with all that is in it, if it is there."""
    if isinstance(path, BucketPath):
        path.remove_below()
    else:
        shutil.rmtree(path, ignore_errors=True)


def move_tree(source: AnyPath, target: AnyPath) -> None:
    """Put a directory in the place of another of the same disk or store. Raises OSError."""
    remove_tree(target)
    if isinstance(source, BucketPath):
        assert isinstance(target, BucketPath)
        source.move_below(target)
    else:
        assert isinstance(target, Path)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)


def free_bytes(path: AnyPath) -> int | None:
    """Room on the disk of a directory that exists; None for a bucket, which has no bound."""
    return None if isinstance(path, BucketPath) else shutil.disk_usage(path).free
