"""Sixteen CPU devices for every test, types and shapes checked at run time, and compilations kept between runs.

Those of all checkouts are kept together: a new one compiles only what is new in it.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=16 " + os.environ.get("XLA_FLAGS", "")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from jaxtyping import install_import_hook

install_import_hook("s1jax", "beartype.beartype")

import jax
import pytest
from hypothesis import settings

from s1jax.compilation_cache import for_this_processor, remove_broken, user_cache
from s1jax.paths import AnyPath, BucketPath, any_path
from tests import tiny

COMPILED = for_this_processor(user_cache().with_name("tests"))
KEPT_DAYS = 14
# Processes that tests start read it.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
jax.config.update("jax_compilation_cache_dir", str(COMPILED))

# A matmul on TPU or GPU may round its inputs; these tests compare in full float32.
jax.config.update("jax_default_matmul_precision", "highest")
# The first example of a property compiles, which says nothing about its speed.
settings.register_profile("s1jax", deadline=None, print_blob=True)
settings.load_profile("s1jax")


def pytest_sessionstart() -> None:
    # Not by workers, nor by the runs that their tests start, beside each other.
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    remove_broken(COMPILED)
    for entry in COMPILED.glob("*-cache"):
        if time.time() - entry.stat().st_mtime > KEPT_DAYS * 86400:
            entry.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def gs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # Not for every run of the tests: the servers are packages of their own.
    from tests.buckets import BUCKET, environment, gcs_server

    with gcs_server(tmp_path_factory.mktemp("gs")) as settings, environment(settings):
        yield f"gs://{BUCKET}"


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    from tests.buckets import BUCKET, environment, s3_server

    with s3_server() as settings, environment(settings):
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> BucketPath:
    """A name in each of the stores below which there is nothing yet."""
    path = any_path(f"{request.getfixturevalue(f'{request.param}_bucket')}/{tmp_path.parent.name}/{tmp_path.name}")
    assert isinstance(path, BucketPath)
    return path


@pytest.fixture(params=["local", "gs", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> AnyPath:
    """A directory without anything in it, on the disk and in each of the stores."""
    if request.param == "local":
        return tmp_path
    return any_path(f"{request.getfixturevalue(f'{request.param}_bucket')}/{tmp_path.parent.name}/{tmp_path.name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with the most slow tests come first, so that no worker is left with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
