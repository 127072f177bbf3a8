"""Products of activations and weights."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from s1jax.mesh import platform


def project(equation: str, x: Float[Array, "batch length ..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum` of each token with a weight, computed and returned in the dtype of `x`."""
    weight = weight.astype(x.dtype)
    if platform() != "cpu" or x.dtype == jnp.float32:
        return jnp.einsum(equation, x, weight)
    # A CPU multiplies half-precision arrays as they are if the sums are float32 and there is more than one row;
    # else XLA first writes a float32 copy of the weight, which costs several times the product.
    single = x.shape[:2] == (1, 1)
    rows = jnp.concatenate([x, x]) if single else x
    product = jnp.einsum(equation, rows, weight, preferred_element_type=jnp.float32).astype(x.dtype)
    return product[:1] if single else product
