"""The kernel's products and its attention over packed rows, against the formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.config import Implementation
from s1jax.mesh import make_mesh
from s1jax.model import cpu_kernel
from s1jax.model.attention import attention
from tests.reference.attention import reference_attention


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 90),
    # More than one part of a panel, too.
    inputs=st.integers(1, 90) | st.integers(250, 260) | st.integers(760, 1200),
    columns=st.integers(1, 90),
    transpose_a=st.booleans(),
    transpose_b=st.booleans(),
    seed=st.integers(0, 9),
)
def test_matrices_are_multiplied_in_any_arrangement(
    rows: int, inputs: int, columns: int, transpose_a: bool, transpose_b: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, inputs), (inputs, columns)))
    exact = a.astype(np.float64) @ b
    assert cpu_kernel.available(jnp.float32)
    product = cpu_kernel.matmul(
        jnp.asarray(a.T if transpose_a else a),
        jnp.asarray(b.T if transpose_b else b),
        transpose_a=transpose_a,
        transpose_b=transpose_b,
    )
    # A sum of n products is of the size of n's root and rounded n times, each time by half an epsilon at most of what
    # it is by then; such errors add up to their number's root, so what is lost grows like n.
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=np.finfo(np.float32).eps * max(200, inputs))


def test_matrices_of_more_rows_and_inputs_than_are_packed_at_once_are_multiplied() -> None:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((600, 2100), (2100, 70)))
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(cpu_kernel.matmul(a, b), exact, rtol=1e-5, atol=2e-4)


@partial(jax.jit, static_argnums=3)
def gradients_and_context(
    qkv: list[jax.Array], segment_ids: jax.Array, weights: jax.Array, implementation: Implementation
) -> tuple[list[jax.Array], jax.Array]:
    def loss(qkv):
        out = attention(*qkv, segment_ids=segment_ids, implementation=implementation)
        return jnp.sum(weights * jnp.sin(out)), out

    return jax.grad(loss, has_aux=True)(qkv)


@settings(deadline=None, max_examples=40)
@given(
    # Some of a block's length and less, some of several blocks.
    lengths=st.lists(st.lists(st.integers(1, 60) | st.integers(100, 180), max_size=4), min_size=2, max_size=2),
    heads=st.sampled_from([(3, 1, 8), (4, 2, 33)]),
    seed=st.integers(0, 9),
)
def test_packed_attention_is_the_plain_one_with_gradients(
    lengths: list[list[int]], heads: tuple[int, int, int], seed: int
) -> None:
    """Two rows of 200 tokens, with the examples that fit, and padding."""
    segment_ids = np.zeros((2, 200), np.int32)
    for row, examples in zip(segment_ids, lengths, strict=True):
        begin = 0
        for number, length in enumerate(examples, 1):
            row[begin : begin + length] = number
            begin += length
    query_heads, kv_heads, head_dim = heads
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(2, 200, count, head_dim) for count in (query_heads, kv_heads, kv_heads, query_heads)]
    *qkv, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    there = (segment_ids > 0)[..., None, None]
    weights, ids = weights * there, jnp.asarray(segment_ids)
    grads, out = gradients_and_context(qkv, ids, weights, "kernel")
    # Which has the reference's values itself, where that would take minutes.
    expected, plain_out = gradients_and_context(qkv, ids, weights, "plain")
    np.testing.assert_allclose(out, np.where(there, plain_out, 0), rtol=1e-5, atol=1e-5)
    for ours, plain in zip(grads, expected, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=2e-5)


def test_attention_of_one_example_needs_no_segments_and_takes_half_precision() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [
        jax.random.normal(key, (1, 70, heads, 16)).astype(jnp.bfloat16)
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    ]
    out = attention(*qkv, implementation="kernel")
    assert out.dtype == jnp.bfloat16
    expected = reference_attention(*(x.astype(jnp.float32) for x in qkv), None, None)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0.01, atol=0.01)


def test_the_kernel_named_outright_is_refused_on_several_devices() -> None:
    qkv = (jnp.ones((2, 8, 2, 8)),) * 3
    mesh = make_mesh(data=2, fsdp=1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="one CPU device"):
        attention(*qkv, implementation="kernel")
