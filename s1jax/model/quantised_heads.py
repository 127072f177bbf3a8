"""Keys and values of int8: symmetric integers, and for each token and head what they are multiplied by.

What is made of a token depends on nothing but the token.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

_GREATEST = 127


class Quantised(NamedTuple):
    """Keys or values, of tokens or in pages.

    Scales are float32, which every kernel takes; bfloat16 would save 2 bytes of the 132 that a head of 128 has.
    """

    integers: Int[Array, "*places head_dim"]
    scales: Float[Array, "*places"]


def quantised(x: Float[Array, "*places head_dim"]) -> Quantised:
    """The nearest integers, of which a head's greatest is 127 or -127. Where `x` is not finite, its scale is not."""
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / _GREATEST
    # Of zeros the scale is 0.
    integers = jnp.round(wide / jnp.where(scales > 0, scales, 1)[..., None])
    return Quantised(integers.astype(jnp.int8), scales)


def widened(x: Any, dtype: DTypeLike) -> Float[Array, "*places head_dim"]:
    """What integers and scales stand for; other arrays are that themselves."""
    if not isinstance(x, Quantised):
        return x
    return (x.integers.astype(jnp.float32) * x.scales[..., None]).astype(dtype)
