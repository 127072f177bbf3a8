"""Small stand-ins for the real things, so that no test needs a download: a tokenizer like Qwen's, random models."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerFast

from s1jax.demo.tokenizer import build_tokenizer
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_model
from s1jax.model.qwen import Params, Qwen

CORPUS = [
    "think answer assistant user system Wait, Final Answer: the sum of 3 and 4 is 7. So 12 * 5 = 60.\n",
    "You are a helpful assistant. How many apples does she have? Let me check this again step by step.\n\n",
]


def tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Save a tokenizer of 368 ids with Qwen's special tokens and chat format in `directory`; return it."""
    return build_tokenizer(directory, CORPUS * 4, vocab_size=420)


QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 364,
}
"""A config.json: vocabulary padded beyond the tokenizer's 368 ids, as Qwen's is."""
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": False}


def model_directory(directory: Path, config: dict[str, Any] = QWEN2, seed: int = 0) -> Path:
    """Save a random model of this config.json in float32, with the tokenizer, and return its directory."""
    model = Qwen(QwenConfig.from_hf(config), dtype=jnp.float32)
    export_model(directory, model, random_params(model, seed))
    tokenizer(directory)
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**written, **config}))
    return directory


def random_params(model: Qwen, seed: int = 0) -> Params:
    """Random parameters with no zeros or ones in biases and norms, and large enough for peaked distributions."""
    keys = iter(jax.random.split(jax.random.key(seed), 100))

    def draw(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.Array:
        noise = jax.random.normal(next(keys), leaf.shape, leaf.dtype)
        return 1 + 0.2 * noise if axes[-1] == "norm" else 0.15 * noise

    return jax.tree.map(draw, model.abstract_params(), model.axes())
