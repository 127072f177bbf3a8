"""Sizes of the models that the presets name, so that planning for one needs no download."""

from typing import Any

from s1jax.model.config import QwenConfig

_QWEN25: dict[str, Any] = {
    "model_type": "qwen2",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
}
_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES: dict[str, tuple[int, ...]] = {
    # Then the key/value heads.
    "0.5B": (151_936, 896, 4_864, 24, 14, 2),
    "7B": (152_064, 3_584, 18_944, 28, 28, 4),
    "32B": (152_064, 5_120, 27_648, 64, 40, 8),
}
_NAMES = {
    "Qwen/Qwen2.5-0.5B": "0.5B",
    "Qwen/Qwen2.5-0.5B-Instruct": "0.5B",
    "Qwen/Qwen2.5-7B-Instruct": "7B",
    "Qwen/Qwen2.5-32B-Instruct": "32B",
    "simplescaling/s1-32B": "32B",
    "simplescaling/s1.1-32B": "32B",
}


def known_architecture(name: str) -> QwenConfig | None:
    """The architecture of a hub id, if it is one of those listed here (their config.json files)."""
    size = _NAMES.get(name)
    if size is None:
        return None
    sizes = dict(zip((*_KEYS, "num_key_value_heads"), _SIZES[size], strict=True))
    return QwenConfig.from_hf({**_QWEN25, **sizes, "tie_word_embeddings": size == "0.5B"})
