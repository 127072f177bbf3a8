"""The same numbers as transformers, for every family and shape of model that is supported."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s1jax.model.config import QwenConfig
from s1jax.model.export import export_model
from s1jax.model.qwen import Qwen
from tests.tiny import QWEN2, QWEN3, random_params

if sys.version_info >= (3, 12):
    pytest.skip("torch 2.13.0 is installed on Python 3.11 only", allow_module_level=True)

import torch
from transformers import AutoModelForCausalLM

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "qwen2-tied-gqa2": QWEN2,
    "qwen2-untied-gqa1": {**QWEN2, "tie_word_embeddings": False, "num_key_value_heads": 4},
    "qwen2-gqa4": {**QWEN2, "num_key_value_heads": 1},
    "qwen2-gqa7": {**QWEN2, "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56},
    "qwen2-yarn": {**QWEN2, "rope_scaling": YARN, "max_position_embeddings": 256},
    "qwen2-yarn-spelled-out": {
        **QWEN2,
        "rope_scaling": {**YARN, "attention_factor": 0.8, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    },
    "qwen3-untied-gqa2": QWEN3,
    "qwen3-tied-gqa4": {**QWEN3, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3-gqa7-yarn": {
        **QWEN3,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "rope_scaling": YARN,
        "rope_theta": 1_000_000.0,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path) -> None:
    model = Qwen(QwenConfig.from_hf(CONFIGS[name]), dtype=jnp.float32)
    params = random_params(model)
    export_model(tmp_path / "model", model, params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    rng = np.random.default_rng(1)
    lengths = [100, 61, 17]
    rows = [rng.integers(0, 368, length) for length in lengths]
    with torch.no_grad():
        expected = [theirs(torch.tensor(row[None])).logits[0].numpy() for row in rows]

    @jax.jit
    def logits(input_ids, positions, segment_ids):
        return model.logits(params, model.hidden_states(params, input_ids, positions, segment_ids)[0])

    padded = np.zeros((3, 100), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    by_padding = logits(padded, np.tile(np.arange(100), (3, 1)), None)
    packed = np.concatenate([*rows, [0, 0]])[None]
    positions = np.concatenate([*(np.arange(n) for n in lengths), [0, 0]])[None]
    segments = np.concatenate([np.repeat([1, 2, 3], lengths), [0, 0]])[None]
    by_packing = np.split(logits(packed, positions, segments)[0], np.cumsum(lengths))
    for i, wanted in enumerate(expected):
        tolerance = 2e-4 * np.abs(wanted).max()
        np.testing.assert_allclose(by_padding[i, : lengths[i]], wanted, rtol=0, atol=tolerance)
        np.testing.assert_allclose(by_packing[i], wanted, rtol=0, atol=tolerance)
