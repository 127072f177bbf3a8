"""Arithmetic of the model, counted by formula, and what devices can do at best.

Convention: a training step takes 6 floating-point operations per token and weight that multiplies it (2 forward, 4
backward; the embedding lookup not counted, the output head counted) and, for attention, 12 x layers x heads x head_dim
per token and visible key, half of the keys being visible on average. Recomputation does not count.
"""

from collections.abc import Iterable

from s1jax.model.config import QwenConfig
from s1jax.model.lora import Lora

PEAK_FLOPS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA A100": 312e12,
    # Sums in float32.
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "TPU v4": 275e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    # Of one of the two devices of a chip.
    "TPU7x": 1153.5e12,
    # libtpu calls v5p plainly "TPU v5"; the longer names above are found first.
    "TPU v5": 459e12,
}
"""Dense bfloat16 floating-point operations per second by the beginning of the device's kind (vendors' data sheets)."""


def matmul_parameters(config: QwenConfig) -> int:
    """Weights that each token is multiplied with."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp) + config.vocab_size * config.hidden_size


def weight_flops(config: QwenConfig, lora: Lora | None, tokens: int | float) -> float:
    """Operations of a training step, attention aside. Frozen weights have no gradient, which is a third of theirs."""
    weights = matmul_parameters(config)
    if lora is None:
        return 6.0 * weights * tokens
    return (4.0 * weights + 6.0 * lora.parameters(config)) * tokens


def attention_flops(config: QwenConfig, squared_lengths: int | float) -> float:
    """Operations of attention in a training step over examples with this sum of squared lengths."""
    return 6.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * squared_lengths


def training_flops(config: QwenConfig, lora: Lora | None, tokens: int, squared_lengths: int) -> float:
    """Operations of one training step over examples with this many tokens, and this sum of squared lengths."""
    return weight_flops(config, lora, tokens) + attention_flops(config, squared_lengths)


def peak_flops(kinds: Iterable[str]) -> float | None:
    """Peak of all the devices together, in operations per second; None if one of them is not in the table."""
    peaks = [next((peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), None) for kind in kinds]
    return None if None in peaks else sum(peak for peak in peaks if peak)
