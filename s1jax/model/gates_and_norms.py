"""What a layer computes between its products.

On a CPU with gradients of their own, which keep less for the backward pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from s1jax.mesh import platform


def gated(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """silu(gate) * up."""
    return _gated_on_cpu(gate, up) if platform() == "cpu" else jax.nn.silu(gate) * up


@jax.custom_vjp
def _gated_on_cpu(gate: Array, up: Array) -> Array:
    """In float32: of half precision XLA would round each step, which takes twice the time."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def _gated_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gated_on_cpu(gate, up), (gate, up)


def _gated_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    gate, up = kept
    open_ = jax.nn.sigmoid(gate)
    return gradient * up * open_ * (1 + gate * (1 - open_)), gradient * gate * open_


_gated_on_cpu.defvjp(_gated_forward, _gated_backward)


def normalised(x: Float[Array, "*shape size"], scale: Float[Array, " size"], epsilon: float) -> Float[Array, "..."]:
    """Root-mean-square normalisation over the last dimension in float32, then scaled; in the dtype of `x`."""
    if platform() == "cpu":
        return _normalised_on_cpu(x, scale, epsilon)
    return _normalise(x, scale, epsilon)[0]


def _normalise(x: Array, scale: Array, epsilon: float) -> tuple[Array, Array]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse).astype(x.dtype) * scale.astype(x.dtype), inverse


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normalised_on_cpu(x: Array, scale: Array, epsilon: float) -> Array:
    return _normalise(x, scale, epsilon)[0]


def _normalise_forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, tuple[Array, Array, Array]]:
    y, inverse = _normalise(x, scale, epsilon)
    return y, (x, scale, inverse)


def _normalise_backward(epsilon: float, kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, scale, inverse = kept
    normal, gradient = x.astype(jnp.float32) * inverse, gradient.astype(jnp.float32)
    of_normal = gradient * scale
    shared = jnp.mean(of_normal * normal, axis=-1, keepdims=True)
    of_scale = jnp.sum(gradient * normal, axis=tuple(range(x.ndim - 1)))
    return (inverse * (of_normal - normal * shared)).astype(x.dtype), of_scale.astype(scale.dtype)


_normalised_on_cpu.defvjp(_normalise_forward, _normalise_backward)
