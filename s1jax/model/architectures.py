"""Sizes of the models that the presets name, so that planning for one needs no download."""

from typing import Any

from s1jax.model.config import QwenConfig

_COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0}
_QWEN25 = {**_COMMON, "model_type": "qwen2", "max_position_embeddings": 32_768}
_QWEN3 = {**_COMMON, "model_type": "qwen3", "max_position_embeddings": 40_960, "head_dim": 128}
_DISTILL = {**_COMMON, "model_type": "qwen2", "max_position_embeddings": 131_072}
_QWQ = {**_QWEN25, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-5}
_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES: dict[str, tuple[int, ...]] = {
    # Then the key/value heads.
    "qwen2 0.5B": (151_936, 896, 4_864, 24, 14, 2),
    "qwen2 1.5B": (151_936, 1_536, 8_960, 28, 12, 2),
    "qwen2 3B": (151_936, 2_048, 11_008, 36, 16, 2),
    "qwen2 7B": (152_064, 3_584, 18_944, 28, 28, 4),
    "qwen2 14B": (152_064, 5_120, 13_824, 48, 40, 8),
    "qwen2 32B": (152_064, 5_120, 27_648, 64, 40, 8),
    "qwen2 72B": (152_064, 8_192, 29_568, 80, 64, 8),
    "qwen3 0.6B": (151_936, 1_024, 3_072, 28, 16, 8),
    "qwen3 1.7B": (151_936, 2_048, 6_144, 28, 16, 8),
    "qwen3 4B": (151_936, 2_560, 9_728, 36, 32, 8),
    "qwen3 8B": (151_936, 4_096, 12_288, 36, 32, 8),
    "qwen3 14B": (151_936, 5_120, 17_408, 40, 40, 8),
    "qwen3 32B": (151_936, 5_120, 25_600, 64, 64, 8),
}
_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen2.5-0.5B": ("qwen2 0.5B", {**_QWEN25, "tie_word_embeddings": True}),
    **{
        f"Qwen/Qwen2.5-{size}-Instruct": (f"qwen2 {size}", {**_QWEN25, "tie_word_embeddings": True})
        for size in ("0.5B", "1.5B", "3B")
    },
    **{f"Qwen/Qwen2.5-{size}-Instruct": (f"qwen2 {size}", _QWEN25) for size in ("7B", "14B", "32B", "72B")},
    "simplescaling/s1-32B": ("qwen2 32B", _QWEN25),
    "simplescaling/s1.1-32B": ("qwen2 32B", _QWEN25),
    "Qwen/QwQ-32B": ("qwen2 32B", _QWQ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2 1.5B", {**_DISTILL, "rope_theta": 10_000.0}),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("qwen2 7B", {**_DISTILL, "rope_theta": 10_000.0}),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": ("qwen2 14B", {**_DISTILL, "rms_norm_eps": 1e-5}),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": ("qwen2 32B", {**_DISTILL, "rms_norm_eps": 1e-5}),
    **{
        f"Qwen/Qwen3-{size}": (f"qwen3 {size}", {**_QWEN3, "tie_word_embeddings": True})
        for size in ("0.6B", "1.7B", "4B")
    },
    **{f"Qwen/Qwen3-{size}": (f"qwen3 {size}", _QWEN3) for size in ("8B", "14B", "32B")},
}


def known_architecture(name: str) -> QwenConfig | None:
    """The architecture of a hub id, if it is one of those listed here (their config.json files)."""
    if name not in _NAMES:
        return None
    size, others = _NAMES[name]
    return QwenConfig.from_hf({**others, **dict(zip((*_KEYS, "num_key_value_heads"), _SIZES[size], strict=True))})
