"""Checkpoints in and out: nothing lost, nothing half written, and every problem named."""

import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig, UnsupportedConfigError
from s1jax.model.export import export_model
from s1jax.model.hf import load_params
from s1jax.model.hf_files import resolve_model
from s1jax.model.qwen import Qwen
from s1jax.model.safetensors_files import CheckpointError
from tests.small_disk import small_disk
from tests.tiny import QWEN2, QWEN3, model_directory, random_params

WIDE = {**QWEN2, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8}


def read(directory: Path, mesh=None, dtype=jnp.float32):
    model = Qwen(QwenConfig.from_directory(directory), dtype=dtype, param_dtype=dtype)
    return model, load_params(directory, model, mesh or make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2-tied", "qwen3-untied"])
def test_import_export_import_is_bit_identical(config: dict, dtype: str, tmp_path: Path) -> None:
    model = Qwen(QwenConfig.from_hf(config), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    export_model(tmp_path / "first", model, random_params(model))
    _, params = read(tmp_path / "first", dtype=jnp.dtype(dtype))
    export_model(tmp_path / "second", model, params, source=tmp_path / "first")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == jnp.dtype(dtype)
        assert tensor.tobytes() == second[name].tobytes()


def test_a_kernel_without_huge_pages_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Qwen(QwenConfig.from_hf({**QWEN2, "vocab_size": 2**15}), dtype=jnp.float32)
    params = random_params(model)
    export_model(tmp_path / "model", model, params)
    # What no kernel knows is refused as huge pages are.
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999, raising=False)
    found = read(tmp_path / "model")[1]["embedding"]["weight"]
    assert found.nbytes >= 2**21
    np.testing.assert_array_equal(found, params["embedding"]["weight"])


def test_transformers_loads_a_sharded_export_without_a_key_missing(tmp_path: Path) -> None:
    if sys.version_info >= (3, 12):
        pytest.skip("torch 2.13.0 is installed on Python 3.11 only")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_directory(tmp_path / "source", QWEN3)
    model, params = read(source)
    target = tmp_path / "sharded"
    export_model(target, model, params, source=source, max_file_bytes=100_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 3
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    assert (target / "generation_config.json").is_file()
    assert AutoTokenizer.from_pretrained(target).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    theirs, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True, dtype=torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    input_ids = np.arange(20)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(input_ids)).logits.numpy()
    hidden, _ = model.hidden_states(params, jnp.asarray(input_ids), jnp.arange(20)[None])
    np.testing.assert_allclose(model.logits(params, hidden), expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [(1, 8, 2), (1, 2, 8), (1, 16, 1), (1, 4, 4), (2, 4, 2)])
def test_every_mesh_reads_the_same_values_each_device_its_part(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "wide", WIDE)
    _, whole = read(directory)
    mesh = make_mesh(*sizes)
    model, params = read(directory, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, model.abstract_params(mesh))
    gate = params["layers"]["mlp"]["gate"]["weight"]
    assert gate.addressable_shards[0].data.shape == (3, 64 // sizes[1], 96 // sizes[2])


def tensors_of(directory: Path) -> tuple[Path, dict[str, np.ndarray]]:
    path = directory / "model.safetensors"
    return path, load_file(path)


def break_missing_tensor(directory: Path) -> None:
    path, tensors = tensors_of(directory)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)


def break_unexpected_tensor(directory: Path) -> None:
    path, tensors = tensors_of(directory)
    save_file({**tensors, "model.layers.9.mlp.up_proj.weight": np.zeros(2, np.float32)}, path)


def break_shape(directory: Path) -> None:
    path, tensors = tensors_of(directory)
    save_file({**tensors, "model.norm.weight": np.zeros(7, np.float32)}, path)


def break_dtype(directory: Path) -> None:
    path, tensors = tensors_of(directory)
    save_file({**tensors, "model.norm.weight": np.zeros(64, np.int8)}, path)


def break_truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def break_garbage(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(os.urandom(4096))


def break_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def break_only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def break_index(directory: Path, file: str) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": file}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing_tensor, r"missing tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        (break_unexpected_tensor, r"unexpected tensor model\.layers\.9\.mlp\.up_proj\.weight"),
        (break_shape, r"model\.norm\.weight has shape \[7\], config.json implies \[64\]"),
        (break_dtype, r"model\.norm\.weight is stored as I8; expected one of BF16, F16, F32"),
        (break_truncated, r"model\.safetensors: not a whole safetensors file"),
        (break_garbage, r"model\.safetensors: not a whole safetensors file"),
        (break_no_weights, r"no model\.safetensors and no model\.safetensors\.index\.json"),
        (break_only_pickle, r"pickle files \(pytorch_model\.bin\) can run code and are not read"),
        (lambda d: break_index(d, "../other.safetensors"), r"names \.\./other\.safetensors, outside the directory"),
        (lambda d: break_index(d, "/tmp/x.safetensors"), r"names /tmp/x\.safetensors, outside the directory"),
        (lambda d: break_index(d, "gone.safetensors"), r"gone\.safetensors: no such file"),
    ],
)
def test_a_damaged_directory_is_refused_by_name(damage, message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as error:
        read(copy)
    assert str(copy) in str(error.value)


def test_several_problems_are_in_one_message(copy: Path) -> None:
    break_missing_tensor(copy)
    break_shape(copy)
    with pytest.raises(CheckpointError) as error:
        read(copy)
    assert "missing tensor" in str(error.value)
    assert "has shape" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"num_experts": 8}, "num_experts = 8: mixtures of experts"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "layers from 1 on use sliding"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_type 'llama3' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is None, expected a positive integer"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=message):
        QwenConfig.from_hf({**QWEN2, **changes})


def test_both_spellings_of_rope_mean_the_same() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 128}
    version_4 = QwenConfig.from_hf({**QWEN2, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **yarn}})
    version_5 = {k: v for k, v in QWEN2.items() if k != "rope_theta"}
    version_5["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e6, **yarn}
    assert QwenConfig.from_hf(version_5) == version_4
    assert QwenConfig.from_hf(version_4.to_hf()) == version_4


def test_missing_directories_and_configs_are_named(copy: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        resolve_model("./nowhere")
    (copy / "config.json").write_text("{")
    with pytest.raises(UnsupportedConfigError, match=r"config\.json: not JSON"):
        QwenConfig.from_directory(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        QwenConfig.from_directory(copy)


def test_an_existing_directory_is_not_written_over(copy: Path) -> None:
    model, params = read(copy)
    with pytest.raises(CheckpointError, match="already exists"):
        export_model(copy, model, params)


def test_a_full_disk_leaves_nothing_behind(copy: Path, tmp_path: Path) -> None:
    model, params = read(copy)
    with small_disk(tmp_path / "disk", "200k") as disk:
        with pytest.raises(CheckpointError, match=r"could not be written.*No space left"):
            export_model(disk / "model", model, params)
        assert list(disk.iterdir()) == []


def test_a_killed_export_leaves_no_model_and_the_next_one_succeeds(copy: Path, tmp_path: Path) -> None:
    model, params = read(copy)
    script = (
        "import os, signal, sys; from pathlib import Path; import jax.numpy as jnp\n"
        "from s1jax.model import export, hf; from s1jax.model.config import QwenConfig\n"
        "from s1jax.mesh import make_mesh; from s1jax.model.qwen import Qwen\n"
        "model = Qwen(QwenConfig.from_directory(Path(sys.argv[1])), dtype=jnp.float32)\n"
        "params = hf.load_params(Path(sys.argv[1]), model, make_mesh())\n"
        "export._write_texts = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.export_model(Path(sys.argv[2]), model, params)\n"
    )
    target = tmp_path / "target"
    killed = subprocess.run([sys.executable, "-c", script, copy, target], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -9
    assert not target.exists()
    export_model(target, model, params)
    assert (target / "config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "target"]
