"""Weights that would make wrong numbers without a word are refused by the name of their tensor."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.hf import CheckpointError, load_params
from s1jax.model.qwen import Params, Qwen
from tests.tiny import QWEN2, QWEN3, model_directory

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {**QWEN2, "tie_word_embeddings": True}


def read(directory: Path, *, stacked: bool = False, devices: int = 1) -> Params:
    model = Qwen(QwenConfig.from_directory(directory), dtype=jnp.float32)
    return load_params(directory, model, make_mesh(devices=jax.devices()[:devices]), stacked=stacked)


def change(directory: Path, change_tensors) -> None:
    tensors = load_file(directory / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda embedding: embedding.copy(), None),
        (lambda embedding: embedding.astype(np.float16), "differs from model.embed_tokens.weight"),
        (lambda embedding: embedding + np.eye(*embedding.shape, dtype=np.float32), "differs from model.embed_tokens"),
        (lambda embedding: embedding[:-1].copy(), "differs from model.embed_tokens.weight"),
        (lambda embedding: embedding.astype(np.int8), "differs from model.embed_tokens.weight"),
    ],
    ids=["copy", "rounded", "own", "shorter", "int8"],
)
def test_a_head_beside_tied_embeddings_is_their_copy_or_refused(head, message: str | None, tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", TIED)
    change(directory, lambda tensors: tensors.update({HEAD: head(tensors[EMBEDDING])}))
    if message is None:
        assert "head" not in read(directory)
        return
    with pytest.raises(CheckpointError, match=message):
        read(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        [EMBEDDING],
        ["model.norm.weight"],
        ["lm_head.weight"],
        ["model.layers.1.self_attn.q_norm.weight"],
        ["model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"],
    ],
)
def test_a_weight_that_is_no_number_is_refused_by_its_tensor(
    names: list[str], stacked: bool, value: float, tmp_path: Path
) -> None:
    directory = model_directory(tmp_path / "model", {**QWEN3, "tie_word_embeddings": False})

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for name in names:
            tensors[name].flat[-1] = value

    change(directory, spoil)
    others = " and 1 other tensors" if len(names) > 1 else ""
    with pytest.raises(CheckpointError, match=f"NaN or infinite weights in {re.escape(names[0] + others)}$"):
        read(directory, stacked=stacked, devices=2)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "expected an object with a weight_map"),
        (b'{"weight_map": []}', "expected an object with a weight_map"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' stands twice"),
        (b'{"weight_map": {"a": "\\ud800"}}', "weight_map.a: not valid Unicode: a lone surrogate"),
        *(
            (json.dumps({"weight_map": {EMBEDDING: file}}).encode(), f"{EMBEDDING} is placed in ")
            for file in (3, None, ["a"], {}, "", "a\0b", "x" * 5000)
        ),
    ],
    ids=range(14),
)
def test_an_index_that_is_none_is_refused_in_one_line(index: bytes, message: str, tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError) as error:
        read(directory)
    _, line = str(error.value).split("\n")
    assert line.startswith("  - model.safetensors.index.json: ")
    assert message in line
    assert len(line) < 400
