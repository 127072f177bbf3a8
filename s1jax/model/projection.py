"""Products of activations and weights."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from s1jax.mesh import platform
from s1jax.model import cpu_kernel

_FEW_ROWS = 64
"""Up to this many rows a CPU spends its time reading the weight; with more, XLA's products are as good as any."""


def project(
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    *,
    inputs: int = 1,
    outputs_first: bool,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """The sums over the last `inputs` dimensions of `x`, computed in the dtype of `x` and returned in it or in `dtype`.

    The weight has the dimensions of its inputs and those of its outputs: the outputs first, or the inputs.
    """
    dtype = dtype or x.dtype
    weight = weight.astype(x.dtype)
    if platform() == "cpu":
        return _project_on_cpu(x, weight, inputs, outputs_first).astype(dtype)
    return _dot(x, weight, inputs, outputs_first, dtype)


def _dot(x: Array, weight: Array, inputs: int, outputs_first: bool, dtype: DTypeLike) -> Array:
    of_x = tuple(range(x.ndim - inputs, x.ndim))
    of_weight = tuple(range(weight.ndim - inputs, weight.ndim) if outputs_first else range(inputs))
    return jax.lax.dot_general(x, weight, ((of_x, of_weight), ((), ())), preferred_element_type=dtype)


def _project_on_cpu(x: Array, weight: Array, inputs: int, outputs_first: bool) -> Array:
    """The product in float32.

    A CPU multiplies half-precision arrays as they are if the sums are float32 and there is more than one row; else XLA
    first writes a float32 copy of the weight, which costs several times the product.
    """
    leading, summed = x.shape[: x.ndim - inputs], x.shape[x.ndim - inputs :]
    rows, size = math.prod(leading), math.prod(summed)
    if outputs_first and rows <= _FEW_ROWS and cpu_kernel.available(x.dtype):
        product = cpu_kernel.multiply_few_rows(x.reshape(rows, size), weight.reshape(-1, size))
        return product.reshape(*leading, *weight.shape[: weight.ndim - inputs])
    if rows == 1 and x.dtype != jnp.float32:
        product = _dot(jnp.broadcast_to(x.reshape(summed), (2, *summed)), weight, inputs, outputs_first, jnp.float32)
        return product[0].reshape(*leading, *product.shape[1:])
    return _dot(x, weight, inputs, outputs_first, jnp.float32)


def look_up(table: Float[Array, "entries size"], ids: Int[Array, "*ids"]) -> Float[Array, "*ids size"]:
    """Entries of a table."""
    if platform() != "cpu" or table.dtype.itemsize != 2:
        return table[ids]
    return _look_up_bits(table, ids)


@jax.custom_vjp
def _look_up_bits(table: Array, ids: Array) -> Array:
    # As integers, which a CPU leaves as they are: of half-precision numbers XLA writes a float32 copy of the table.
    bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits[ids], table.dtype)


def _look_up_forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return _look_up_bits(table, ids), (table, ids)


def _look_up_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, ids = operands
    return jnp.zeros_like(table).at[ids].add(gradient), None


_look_up_bits.defvjp(_look_up_forward, _look_up_backward)
