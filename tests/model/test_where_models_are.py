"""Models in and out of buckets as on a disk: read by ranges, written with config.json last."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_model, is_exported
from s1jax.model.hf import load_params
from s1jax.model.hf_files import resolve_model, stored_dtypes
from s1jax.model.qwen import Qwen
from s1jax.model.safetensors_files import CheckpointError, read_header
from s1jax.paths import AnyPath, BucketPath, files_below, write_whole
from s1jax.tokenizer import load_tokenizer
from tests.tiny import QWEN2, QWEN3, model_directory, random_params

ROOT = Path(__file__).parents[2]
WIDE = {**QWEN2, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8}


def copy_to(source: Path, target: AnyPath) -> AnyPath:
    for file in source.iterdir():
        write_whole(target / file.name, file.read_bytes())
    return target


def read(directory: AnyPath, mesh: jax.sharding.Mesh | None = None) -> tuple[Qwen, dict]:
    model = Qwen(QwenConfig.from_directory(directory), dtype=jnp.float32)
    return model, load_params(directory, model, mesh or make_mesh(devices=jax.devices()[:1]))


def test_a_model_goes_around_through_every_kind_of_path(root: AnyPath, tmp_path: Path) -> None:
    source = copy_to(model_directory(tmp_path / "source", QWEN3), root / "source")
    assert resolve_model(str(source)) == source
    assert stored_dtypes(source) == {"F32"}
    model, params = read(source)
    export_model(root / "copy", model, params, source=source, max_file_bytes=100_000)
    assert len([file for file in files_below(root / "copy") if file.suffix == ".safetensors"]) > 3
    assert is_exported(root / "copy")
    jax.tree.map(np.testing.assert_array_equal, read(root / "copy")[1], params)
    assert load_tokenizer(root / "copy").get_vocab() == load_tokenizer(tmp_path / "source").get_vocab()
    with pytest.raises(CheckpointError, match="already exists"):
        export_model(root / "copy", model, params)


def test_each_block_is_fetched_once_for_all_devices(
    bucket: BucketPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = model_directory(tmp_path / "wide", WIDE)
    directory = copy_to(local, bucket / "wide")
    monkeypatch.setattr("s1jax.model.hf._BLOCK_BYTES", 4096)
    fetched: list[tuple[int, int]] = []
    fetch = BucketPath.read_range

    def counted(path: BucketPath, start: int, stop: int) -> bytes:
        fetched.append((start, stop))
        return fetch(path, start, stop)

    monkeypatch.setattr(BucketPath, "read_range", counted)
    _, whole = read(local)
    mesh = make_mesh(2, 4, 2)
    model, params = read(directory, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, model.abstract_params(mesh))
    blocks = sorted(fetched[1:])  # The first is the header.
    assert all(stop - start <= 4096 for start, stop in blocks)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(blocks))
    assert sum(stop - start for start, stop in blocks) == sum(x.nbytes for x in jax.tree.leaves(whole))


def test_what_is_amiss_is_named(root: AnyPath, tmp_path: Path) -> None:
    directory = copy_to(model_directory(tmp_path / "source"), root / "model")
    with pytest.raises(FileNotFoundError, match="nothing"):
        resolve_model(f"{root}/nothing")
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    write_whole(weights, whole[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file .*bytes, .* header"):
        read(directory)
    write_whole(directory / "model.safetensors.index.json", json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        read(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        read(directory)


def test_a_file_cut_short_after_its_header_was_read_is_refused(
    root: AnyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_to(model_directory(tmp_path / "source"), root / "model")
    weights = directory / "model.safetensors"
    tensors = read_header(weights)
    write_whole(weights, weights.read_bytes()[:-100_000])
    monkeypatch.setattr("s1jax.model.hf_files.read_header", lambda path: tensors)
    with pytest.raises(CheckpointError, match="ends before its tensors do") as error:
        read(directory)
    assert str(weights) in str(error.value)


def test_a_missing_bucket_is_said_in_one_line(bucket: BucketPath) -> None:
    with pytest.raises(OSError, match=f"{bucket.scheme}://no-such-bucket/m") as error:
        resolve_model(f"{bucket.scheme}://no-such-bucket/m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_as_numpy_casts_them(dtype: str, tmp_path: Path) -> None:
    """Ties, subnormal numbers, infinities and what overflows among them; sharded and not."""
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1e-40, 6e-8, 3e-5, 65519.0, 65520.0, np.inf, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38]
    model = Qwen(QwenConfig.from_hf(QWEN2), dtype=jnp.float32)
    values = rng.standard_normal((384, 64), np.float32) * 10.0 ** rng.integers(-8, 5, (384, 64))
    values.flat[: len(special)] = special
    mesh = make_mesh(1, 8, 2)
    params = random_params(model)
    params["embedding"]["weight"] = jnp.asarray(values)
    sharded = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), params, model.abstract_params(mesh))
    with np.errstate(over="ignore"):
        expected = values.astype(np.float32).astype(jnp.dtype(dtype))
    for name, tree in (("whole", params), ("sharded", sharded)):
        export_model(tmp_path / name, model, tree, dtype=dtype)
        stored = load_file(tmp_path / name / "model.safetensors")["model.embed_tokens.weight"]
        np.testing.assert_array_equal(stored, expected)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "sharded" / "model.safetensors"
    ).read_bytes()


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_model
from s1jax.model.hf import load_params
from s1jax.model.qwen import Qwen
from s1jax.paths import BucketPath, any_path
source, target, last = any_path(sys.argv[1]), any_path(sys.argv[2]), sys.argv[3]
model = Qwen(QwenConfig.from_directory(source), dtype=jnp.float32)
params = load_params(source, model, make_mesh())
write = BucketPath.write_bytes
def stop_at(path, content):
    if path.name == last:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
BucketPath.write_bytes = stop_at
export_model(target, model, params, source=source, max_file_bytes=100_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("last", ["model-00002-of-00005.safetensors", "config.json"])
def test_a_killed_export_to_a_bucket_leaves_no_model(last: str, bucket: BucketPath, tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source")
    target = bucket / "model"
    words = [sys.executable, "-c", KILLED, source, str(target), last]
    killed = subprocess.run(words, cwd=ROOT, env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert files_below(target)
    assert not is_exported(target)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read(target)
    model, params = read(source)
    export_model(target, model, params, source=source)
    assert [file.name for file in files_below(target) if file.suffix == ".safetensors"] == ["model.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, read(target)[1], params)
