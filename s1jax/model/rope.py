"""Rotary position embeddings, with YaRN context extension; all angles in float32."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from s1jax.model.config import QwenConfig


def rope_frequencies(config: QwenConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [head_dim / 2] in float32, and the factor by which cosines and sines are multiplied.

    YaRN: arXiv 2309.00071, section 3, as transformers computes it.
    """
    size, theta = config.head_dim, config.rope_theta
    # A 32-bit power, as transformers computes it, so that long positions turn by the same angle.
    frequencies = 1.0 / np.float32(theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies.astype(np.float32), 1.0

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        return (
            size * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies = frequencies / yarn.factor * ramp + frequencies * (1 - ramp)
    magnitude = yarn.attention_factor
    if magnitude is None:
        magnitude = 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
    return frequencies.astype(np.float32), magnitude


def rope_rotations(
    positions: Int[Array, "batch length"], frequencies: np.ndarray, magnitude: float
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """Cosines and sines of every position's angles, in float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(
    x: Float[Array, "batch length heads head_dim"], rotations: tuple[Array, Array]
) -> Float[Array, "batch length heads head_dim"]:
    """Turn each pair (x[i], x[i + head_dim / 2]) by its angle; the pairing is that of Hugging Face's checkpoints."""
    cos, sin = (part[:, :, None] for part in rotations)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
