"""A tiny model that thinks and stops thinking, and decode.py generate as a person runs it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from s1jax.config import DecodingMeshSection, ModelSection
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.load import LoadedModel, load_model
from s1jax.model.qwen import Qwen
from tests.tiny import QWEN2, model_directory

ROOT = Path(__file__).parents[2]
CONTEXT = 160
CONFIG = {**QWEN2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
CONFIG = {**CONFIG, "max_position_embeddings": CONTEXT}


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends its thinking often: its delimiters' embeddings are long."""
    directory = model_directory(tmp_path_factory.mktemp("generate") / "model", CONFIG, seed=3)
    weights, tokenizer = load_file(directory / "model.safetensors"), AutoTokenizer.from_pretrained(directory)
    embedding = weights["model.embed_tokens.weight"]
    for delimiter, length in (("<|im_start|>", 2.2), ("<|im_end|>", 1.3), ("</think>", 2.2)):
        embedding[tokenizer.convert_tokens_to_ids(delimiter)] *= length
    # Ids beyond the tokenizer have the longest rows of all: only the sampler's mask keeps them out.
    embedding[368:] *= 5
    save_file(weights, directory / "model.safetensors")
    return directory


def untrained(context: int) -> LoadedModel:
    """A random model of this context length on one device, without a directory."""
    model = Qwen(replace(QwenConfig.from_hf(QWEN2), max_position_embeddings=context), dtype=jnp.float32)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return LoadedModel(model, jax.jit(model.unstack)(model.init(jax.random.key(0), mesh)), mesh, Path())


@pytest.fixture(scope="session")
def loaded(directory: Path) -> LoadedModel:
    return load_model(ModelSection(path=str(directory), dtype="float32"), DecodingMeshSection(fsdp=8, tensor=2))


def command(directory: Path, *words: str) -> list[str]:
    settings = [f"model.path={directory}", "model.dtype=float32", "budget.max_answer_tokens=8"]
    return [sys.executable, "decode.py", "generate", *settings, "max_total_tokens=150", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": ""}


def run(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(directory, *words), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
