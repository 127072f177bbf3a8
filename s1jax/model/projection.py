"""Products of activations and weights."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from s1jax.mesh import platform
from s1jax.model import cpu_kernel

_LANES = 16
"""Of the kernels' widest vectors: so many neighbours must have the same scale."""


def project(
    x: Float[Array, "..."],
    weight: Shaped[Array, "..."],
    scale: Float[Array, "..."] | None = None,
    *,
    inputs: int = 1,
    outputs_first: bool,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """The sums over the last `inputs` dimensions of `x`, computed in the dtype of `x` and returned in it or in `dtype`.

    The weight has the dimensions of its inputs and those of its outputs: the outputs first, or the inputs. If it is of
    integers, the scale has those of its outputs and one of groups of inputs, in the same order.
    """
    dtype = dtype or x.dtype
    if scale is not None:
        return _project_quantised(x, weight, scale, inputs, outputs_first, dtype).astype(dtype)
    if platform() == "cpu":
        return _project_on_cpu(x, weight, inputs, outputs_first, dtype).astype(dtype)
    return _dot(x, weight.astype(x.dtype), inputs, outputs_first, dtype)


def _project_quantised(
    x: Array, weight: Array, scale: Array, inputs: int, outputs_first: bool, dtype: DTypeLike
) -> Array:
    """The product, of which XLA makes one with an operand that it widens: but not one that it must scale as well."""
    groups = scale.shape[-1 if outputs_first else 0]
    each = math.prod(x.shape[x.ndim - inputs :]) // groups
    if outputs_first and platform() == "cpu" and cpu_kernel.available(weight.dtype) and each % _LANES == 0:
        return _quantised_by_kernel(x, weight, scale, inputs)
    if groups == 1:
        product = _dot(x, weight.astype(x.dtype), inputs, outputs_first, _of_sums(dtype))
        return product * scale.reshape(product.shape[x.ndim - inputs :])
    if x.size // (groups * each) < each:
        return _product_by_groups(x, weight, scale, inputs, outputs_first)
    return _dot(x, widened(weight, scale, inputs, outputs_first).astype(x.dtype), inputs, outputs_first, dtype)


def _of_sums(dtype: DTypeLike) -> DTypeLike:
    """The dtype of sums that are not scaled yet: they may be more than the greatest of float16."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def _product_by_groups(x: Array, weight: Array, scale: Array, inputs: int, outputs_first: bool) -> Array:
    """The sums of each group of inputs times their scales; XLA widens the integers inside the product.

    GPUs write these sums: one for each row, where a wide weight has one number for each input of the group. TPUs add
    them up in the product.
    """
    leading = x.shape[: x.ndim - inputs]
    at = scale.ndim - 1 if outputs_first else 0
    groups, outputs = scale.shape[at], (*scale.shape[:at], *scale.shape[at + 1 :])
    rows = x.reshape(math.prod(leading), groups, -1)
    if platform() != "tpu":
        # XLA would see that several products have the same rows, and write wide weights side by side for one of all.
        rows, weight = jax.lax.optimization_barrier((rows, weight))
    elif len(rows) == 1:
        # Of one row XLA makes a sum of products, for which it writes a wide weight there.
        rows = jnp.broadcast_to(rows, (2, *rows.shape[1:]))
    in_groups = (*scale.shape[: at + 1], rows.shape[-1], *scale.shape[at + 1 :])
    sums = jax.lax.dot_general(
        rows,
        weight.astype(x.dtype).reshape(in_groups),
        (((2,), (at + 1,)), ((1,), (at,))),
        precision=precision_of(x),
        preferred_element_type=_of_sums(x.dtype),
    )
    scaled = sums.astype(jnp.float32) * jnp.moveaxis(scale, at, 0)[:, None]
    return jnp.sum(scaled, axis=0)[: math.prod(leading)].reshape(*leading, *outputs)


def widened(
    weight: Int[Array, "..."], scale: Float[Array, "..."], inputs: int, outputs_first: bool
) -> Float[Array, "..."]:
    """The weight that integers and their scales stand for, in float32; its dimensions are as those of `project`."""
    of_inputs = weight.shape[weight.ndim - inputs :] if outputs_first else weight.shape[:inputs]
    axis = scale.ndim - 1 if outputs_first else 0
    each = math.prod(of_inputs) // scale.shape[axis]
    shape = (*scale.shape[: axis + 1], each, *scale.shape[axis + 1 :])
    repeated = jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), shape).reshape(weight.shape)
    return weight.astype(jnp.float32) * repeated


def project_gated(
    x: Float[Array, "*rows inputs"], gate: Float[Array, "outputs inputs"], up: Float[Array, "outputs inputs"]
) -> Float[Array, "*rows outputs"] | None:
    """silu of the product with one weight times that with another, where both are made faster together; or else None.

    Of half precision on a CPU with matrix units.
    """
    if not x.dtype == gate.dtype == up.dtype == jnp.bfloat16 or not cpu_kernel.has_tiles():
        return None
    return cpu_kernel.multiply_gated(x.reshape(-1, x.shape[-1]), gate, up).reshape(*x.shape[:-1], -1)


def _by_kernel(
    x: Array, weight: Array, inputs: int, scale: Array | None = None, dtype: DTypeLike = jnp.float32
) -> Array:
    """The product with a weight whose outputs come first: in float32, or in `dtype` if that is faster.

    Which kernel makes it is decided by what a row is, not by how many there are: so a row's numbers do not depend on
    the rows beside it. Matrix units wait for integers to be widened, which for few tokens takes twice the time; where
    there are none, vectors of bfloat16 are multiplied for many tokens, too.
    """
    leading, size = x.shape[: x.ndim - inputs], math.prod(x.shape[x.ndim - inputs :])
    rows, matrix = x.reshape(-1, size), weight.reshape(-1, size)
    if scale is not None:
        scale = scale.reshape(-1, scale.shape[-1])
    single_tokens = leading[1:] in ((), (1,))
    half = x.dtype == jnp.bfloat16
    if half and cpu_kernel.has_pairs():
        product = cpu_kernel.multiply(rows, matrix, scale)
    elif half and (scale is None or not single_tokens) and cpu_kernel.has_tiles():
        product = cpu_kernel.multiply_by_tiles(rows, matrix, scale, dtype)
    elif single_tokens:
        product = cpu_kernel.multiply(rows.astype(jnp.float32), matrix, scale)
    else:
        product = cpu_kernel.matmul(rows.astype(jnp.float32), matrix, scale, transpose_b=True)
    return product.reshape(*leading, *weight.shape[: weight.ndim - inputs])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _quantised_by_kernel(x: Array, weight: Array, scale: Array, inputs: int) -> Array:
    return _by_kernel(x, weight, inputs, scale)


def _quantised_forward(x: Array, weight: Array, scale: Array, inputs: int) -> tuple[Array, tuple[Array, ...]]:
    return _by_kernel(x, weight, inputs, scale), (x, weight, scale)


def _quantised_backward(inputs: int, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, None, None]:
    """By the activations only: what is quantised is not trained."""
    x, weight, scale = kept
    wide = widened(weight, scale, inputs, outputs_first=True)
    of_x, _ = _backward(inputs, True, jnp.float32, (x.astype(jnp.float32), wide), gradient)
    return of_x.astype(x.dtype), None, None


_quantised_by_kernel.defvjp(_quantised_forward, _quantised_backward)


def precision_of(x: Array) -> jax.lax.Precision | None:
    """How products with `x` are computed: float32 is float32, where GPUs would take tf32 and TPUs bfloat16 for it."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _dot(x: Array, weight: Array, inputs: int, outputs_first: bool, dtype: DTypeLike) -> Array:
    of_x = tuple(range(x.ndim - inputs, x.ndim))
    of_weight = tuple(range(weight.ndim - inputs, weight.ndim) if outputs_first else range(inputs))
    return jax.lax.dot_general(
        x, weight, ((of_x, of_weight), ((), ())), precision=precision_of(x), preferred_element_type=dtype
    )


def _product_on_cpu(x: Array, weight: Array, inputs: int, outputs_first: bool, dtype: DTypeLike) -> Array:
    """The product in float32, or in `dtype` if that is faster.

    The kernels widen a weight as they read it. XLA first writes a float32 copy of it, which costs several times the
    product, unless both are of half precision, the sums are float32 and there is more than one row.
    """
    leading, summed = x.shape[: x.ndim - inputs], x.shape[x.ndim - inputs :]
    rows, size = math.prod(leading), math.prod(summed)
    outputs = weight.shape[: weight.ndim - inputs] if outputs_first else weight.shape[inputs:]
    if weight.dtype.itemsize > x.dtype.itemsize:
        weight = weight.astype(x.dtype)
    if cpu_kernel.available(weight.dtype) and (outputs_first or x.dtype == jnp.float32):
        if outputs_first:
            return _by_kernel(x, weight, inputs, dtype=dtype)
        return cpu_kernel.matmul(x.reshape(rows, size), weight.reshape(size, -1)).reshape(*leading, *outputs)
    weight = weight.astype(x.dtype)
    if rows == 1 and x.dtype != jnp.float32:
        product = _dot(jnp.broadcast_to(x.reshape(summed), (2, *summed)), weight, inputs, outputs_first, jnp.float32)
        return product[0].reshape(*leading, *outputs)
    return _dot(x, weight, inputs, outputs_first, jnp.float32)


def _forward(
    x: Array, weight: Array, inputs: int, outputs_first: bool, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    return _product_on_cpu(x, weight, inputs, outputs_first, dtype), (x, weight)


def _backward(
    inputs: int, outputs_first: bool, dtype: DTypeLike, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, weight = kept
    size = math.prod(x.shape[x.ndim - inputs :])
    # As matrices: of arrays with more dimensions XLA transposes the copies that it multiplies.
    rows, gradients = x.reshape(-1, size), gradient.reshape(-1, weight.size // size).astype(x.dtype)
    matrix = weight.reshape(-1, size) if outputs_first else weight.reshape(size, -1)
    of_x = _matmul(gradients, matrix.astype(x.dtype), transpose_b=not outputs_first)
    of_weight = _matmul(*((gradients, rows) if outputs_first else (rows, gradients)), transpose_a=True)
    return of_x.reshape(x.shape).astype(x.dtype), of_weight.reshape(weight.shape).astype(weight.dtype)


_project_on_cpu = jax.custom_vjp(_product_on_cpu, nondiff_argnums=(2, 3, 4))
_project_on_cpu.defvjp(_forward, _backward)


def _matmul(a: Array, b: Array, *, transpose_a: bool = False, transpose_b: bool = False) -> Array:
    """The product of two matrices, in float32."""
    if a.dtype == jnp.float32 and cpu_kernel.available(jnp.float32):
        return cpu_kernel.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b)
    axes = (((0 if transpose_a else 1,), (1 if transpose_b else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision_of(a), preferred_element_type=jnp.float32)


def is_product(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """Whether this is what `project` makes of activations and a weight; a policy for `jax.checkpoint`."""
    if parameters.get("target_name") in (cpu_kernel.MATMUL, cpu_kernel.MULTIPLY, cpu_kernel.TILES):
        return True
    return bool(jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **parameters))


def look_up(
    table: Shaped[Array, "entries size"],
    ids: Int[Array, "*ids"],
    dtype: DTypeLike,
    scale: Float[Array, "entries 1"] | None = None,
) -> Float[Array, "*ids size"]:
    """Entries of a table, in `dtype`; of one of integers, with their scales."""
    if scale is not None:
        return (table[ids].astype(jnp.float32) * scale[ids]).astype(dtype)
    if table.dtype.itemsize > jnp.dtype(dtype).itemsize:
        table = table.astype(dtype)
    half_on_cpu = platform() == "cpu" and table.dtype.itemsize == 2
    entries = _look_up_on_cpu(table, ids) if half_on_cpu else table[ids]
    return entries.astype(dtype)


@jax.custom_vjp
def _look_up_on_cpu(table: Array, ids: Array) -> Array:
    """Entries of a table of half precision, of which XLA writes a float32 copy; of integers it reads what is asked for.

    Unless they are the same in each turn of a loop: then it writes a copy of the table's size before, and so they may
    not be seen to be.
    """
    table, ids = jax.lax.optimization_barrier((table, ids))
    bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits[ids], table.dtype)


def _look_up_forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return _look_up_on_cpu(table, ids), (table, ids)


def _look_up_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, ids = operands
    return jnp.zeros_like(table).at[ids].add(gradient), None


_look_up_on_cpu.defvjp(_look_up_forward, _look_up_backward)
