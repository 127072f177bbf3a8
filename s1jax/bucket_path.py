"""Objects of buckets, gs:// and s3://, behind the part of pathlib that this project uses.

Buckets have neither folders, renames nor appending: an object is there whole or not at all.
"""

import contextlib
import errno
import logging
import posixpath
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import fsspec.config

_TIMEOUT_SECONDS = 60
_ATTEMPTS = 8
"""Of one request, when the store answers that it is busy or broken."""


class PathError(ValueError):
    """A path of a kind that is not read or written here."""


class BucketPath:
    """An object of a bucket, or all objects below a name; behaves as pathlib's paths do where both have a method.

    Errors are OSErrors that name the path, whichever library found them.
    """

    def __init__(self, scheme: str, key: str):
        """`key` is bucket and object, without the scheme."""
        self.scheme, self._key = scheme, PurePosixPath(key)

    def __str__(self) -> str:
        return f"{self.scheme}://{self._key}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(other) == str(self)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, part: str) -> "BucketPath":
        return BucketPath(self.scheme, str(self._key / part))

    @property
    def name(self) -> str:
        """The last part."""
        return self._key.name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return self._key.stem

    @property
    def suffix(self) -> str:
        """From the last dot of the last part on."""
        return self._key.suffix

    @property
    def parent(self) -> "BucketPath":
        """What the object lies in."""
        return BucketPath(self.scheme, str(self._key.parent))

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self._key.parts[0]

    @property
    def object_name(self) -> str:
        """The name within the bucket."""
        return "/".join(self._key.parts[1:])

    def with_name(self, name: str) -> "BucketPath":
        """Beside this one."""
        return BucketPath(self.scheme, str(self._key.with_name(name)))

    def resolve(self) -> "BucketPath":
        """The same without `..`."""
        return BucketPath(self.scheme, posixpath.normpath(str(self._key)))

    def relative_to(self, other: "BucketPath") -> PurePosixPath:
        """The rest of the name below `other`."""
        return self._key.relative_to(other._key)

    def exists(self) -> bool:
        """Whether there is such an object, or one below it."""
        with self._errors():
            return bool(self._system.exists(str(self._key)))

    def is_file(self) -> bool:
        """Whether there is an object of exactly this name."""
        with self._errors():
            return bool(self._system.isfile(str(self._key)))

    def is_dir(self) -> bool:
        """Whether there are objects below this name."""
        with self._errors():
            return bool(self._system.isdir(str(self._key)))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: an object's name needs no folder."""

    def iterdir(self) -> Iterator["BucketPath"]:
        """What lies directly below, in no fixed order; nothing if there is nothing."""
        with self._errors():
            try:
                names = self._system.ls(str(self._key), detail=False)
            except FileNotFoundError:
                names = []
        for name in names:
            if name.strip("/") != str(self._key):
                yield BucketPath(self.scheme, name.strip("/"))

    def files_below(self) -> list["BucketPath"]:
        """Every object below this name, sorted."""
        with self._errors():
            names = self._system.find(str(self._key))
        # Where something comes to be below it while s3fs looks, that says there is a directory, and calls it a file.
        return sorted(BucketPath(self.scheme, name) for name in names if name != str(self._key))

    def read_bytes(self) -> bytes:
        """The whole object."""
        with self._errors():
            return bytes(self._system.cat_file(str(self._key)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes from `start` up to `stop`, or up to the end if that is before."""
        with self._errors():
            return bytes(self._system.cat_file(str(self._key), start=start, end=stop))

    def size(self) -> int:
        """Bytes of the object."""
        with self._errors():
            return int(self._system.size(str(self._key)))

    def write_bytes(self, content: bytes | bytearray) -> None:
        """Replace the object; it is there whole when this returns, or as it was."""
        with self._errors():
            self._system.pipe_file(str(self._key), content)

    def write_text(self, content: str, encoding: str = "utf-8") -> None:
        """Replace the object by a text."""
        self.write_bytes(content.encode(encoding))

    def upload(self, file: Path) -> None:
        """Replace the object by a local file's content."""
        with self._errors():
            self._system.put_file(str(file), str(self._key))

    def create(self, content: bytes) -> bool:
        """Make the object unless it is there; whether it was made. Of several processes at once, one makes it."""
        with self._errors():
            try:
                self._system.pipe_file(str(self._key), content, mode="create")
            except FileExistsError:
                return False
            except Exception as error:
                if _code(error) not in ("412", "PreconditionFailed", "409", "ConditionalRequestConflict"):
                    raise
                return False
        return True

    def checksum(self) -> str:
        """What the store says of the object's content: its size and a digest, made when it was written."""
        with self._errors():
            return _checksum(self._system.info(str(self._key)))

    def checksums_below(self) -> dict[str, str]:
        """`checksum` of every object below this name, by the rest of its name."""
        with self._errors():
            found = self._system.find(str(self._key), detail=True)
        return {str(PurePosixPath(name).relative_to(self._key)): _checksum(info) for name, info in found.items()}

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        with self._errors():
            try:
                self._system.rm_file(str(self._key))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove_below(self) -> None:
        """Remove every object below this name."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._system.rm(str(self._key), recursive=True)

    def move_below(self, target: "BucketPath") -> None:
        """Give every object below this name one below `target`, in the same store: the store copies each."""
        with self._errors():
            names = self._system.find(str(self._key))
            moved = [str(target._key / PurePosixPath(name).relative_to(self._key)) for name in names]
            self._system.copy(names, moved)
            self._system.rm(names)

    @property
    def _system(self) -> Any:
        return _file_system(self.scheme)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever a store's library raises, as an OSError of one line with the path in it."""
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object or bucket", str(self)) from None
        except PermissionError as error:
            raise PermissionError(errno.EACCES, f"not permitted ({_first_line(error)})", str(self)) from None
        except PathError:
            raise
        except _library_errors() as error:
            if str(error).startswith("Forbidden:"):  # How gcsfs says it; the store's own words are on a second line.
                raise PermissionError(
                    errno.EACCES, f"not permitted ({str(error).splitlines()[-1]})", str(self)
                ) from None
            raise OSError(errno.EIO, _first_line(error), str(self)) from error


def _settle(scheme: str, options: dict[str, Any]) -> None:
    """Make these fsspec's defaults, which orbax finds too; what a person's own configuration of fsspec says wins."""
    fsspec.config.conf[scheme] = {**options, **fsspec.config.conf.get(scheme, {})}


_settle("gs", {"use_listings_cache": False, "requests_timeout": _TIMEOUT_SECONDS})
_settle(
    "s3",
    {
        "use_listings_cache": False,
        "config_kwargs": {
            "retries": {"max_attempts": _ATTEMPTS, "mode": "standard"},
            "connect_timeout": 10,
            "read_timeout": _TIMEOUT_SECONDS,
        },
    },
)


logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It prints a traceback for what it raises, too.


def _file_system(scheme: str) -> Any:
    """The library's side of a scheme. Raises PathError if it is not installed."""
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise PathError(f"{scheme}:// needs {error.name}: pip install '.[buckets]'") from None


@lru_cache
def _library_errors() -> tuple[type[BaseException], ...]:
    """What the installed stores' libraries raise beside OSError."""
    errors: list[type[BaseException]] = [OSError]
    with contextlib.suppress(ImportError):
        import aiohttp
        import gcsfs.retry
        import google.auth.exceptions

        errors += [gcsfs.retry.HttpError, gcsfs.retry.ChecksumError, aiohttp.ClientError]
        errors += [google.auth.exceptions.GoogleAuthError, ValueError]  # The last one is its word for a bad request.
    with contextlib.suppress(ImportError):
        import botocore.exceptions

        errors += [botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError]
    return tuple(errors)


def _checksum(info: dict[str, Any]) -> str:
    """Size and digest, as a store tells them of an object."""
    return f"{info['size']} {info.get('md5Hash') or info.get('crc32c') or info.get('ETag')}"


def _code(error: Exception) -> str:
    """The code that a store's answer had, as its library keeps it."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(getattr(error, "code", None) or response.get("Error", {}).get("Code", ""))


def _first_line(error: BaseException) -> str:
    """What went wrong; of an answer without words its status."""
    text = ((isinstance(error, OSError) and error.strerror) or str(error)).strip(" ,\n")
    return f"HTTP status {text}" if text.isdecimal() else (text or repr(error)).splitlines()[0]
