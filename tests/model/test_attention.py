"""Chunked attention against the plain one, and the plain one against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.model import attention as module
from s1jax.model import block_attention
from s1jax.model.attention import attention, cached_attention
from tests.reference.attention import reference_attention


def arrays(batch: int, length: int, key_length: int, heads: int, kv_heads: int, seed: int = 0) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, length, heads, 8), (batch, key_length, kv_heads, 8), (batch, key_length, kv_heads, 8)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def packed_segments(batch: int, length: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.integers(1, 4, length)) for _ in range(batch)]
    return jnp.stack([jnp.where(jnp.arange(length) < length - 3, row, 0) for row in rows])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 queries, so that short rows are cut too."""
    monkeypatch.setattr(module, "_SCORES_PER_CHUNK", 1)


@settings(max_examples=15)
@given(
    length=st.sampled_from([1, 2, 9]),
    groups=st.sampled_from([1, 2, 7]),
    segments=st.booleans(),
    seed=st.integers(0, 9),
)
def test_plain_attention_is_the_formula(length: int, groups: int, segments: bool, seed: int) -> None:
    query, key, value = arrays(2, length, length, 2 * groups, 2, seed)
    segment_ids = jnp.asarray(np.random.default_rng(seed).integers(0, 3, (2, length))) if segments else None
    out = attention(query, key, value, segment_ids=segment_ids, implementation="plain")
    expected = reference_attention(query, key, value, None, segment_ids)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_cached_attention_is_the_formula() -> None:
    query, key, value = arrays(3, 1, 12, 4, 2)
    last = jnp.array([0, 5, 11])
    expected = reference_attention(query, key, value, last[:, None], None)
    out = cached_attention(query[:, 0], key.swapaxes(1, 2), value.swapaxes(1, 2), last)
    np.testing.assert_allclose(out, expected[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("length", [16, 40, 64])
@pytest.mark.parametrize("segments", [False, True])
def test_chunked_equals_plain_with_gradients(length: int, segments: bool) -> None:
    query, key, value = arrays(2, length, length, 4, 2)
    segment_ids = packed_segments(2, length) if segments else None

    def loss(qkv, implementation):
        out = attention(*qkv, segment_ids=segment_ids, implementation=implementation)
        return jnp.sum(jnp.sin(out)), out

    grads = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    for a, b in zip(
        jax.tree.leaves(grads((query, key, value), "plain")),
        jax.tree.leaves(grads((query, key, value), "chunked")),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    length=st.sampled_from([1, 7, 8, 9, 40]),
    groups=st.sampled_from([1, 3]),
    examples=st.sampled_from([0, 1, 3, 9]),
    sorted_ids=st.booleans(),
    seed=st.integers(0, 9),
)
def test_blocks_equal_the_formula_with_gradients(
    length: int, groups: int, examples: int, sorted_ids: bool, seed: int
) -> None:
    """Rows of up to 9 examples and padding, of no example but padding, and, not `sorted_ids`, in any order."""
    qkv = arrays(2, length, length, 2 * groups, 2, seed)
    ids = np.random.default_rng(seed).integers(0, examples + 1, (2, length))
    if sorted_ids:
        # Ascending, and padding (0) at the end.
        ids = np.sort(ids, axis=1)
        ids = np.array([np.roll(row, -np.count_nonzero(row == 0)) for row in ids])
    segment_ids = jnp.asarray(ids)
    weights = jax.random.normal(jax.random.key(seed), qkv[0].shape)

    def loss(qkv, implementation):
        out = attention(*qkv, segment_ids=segment_ids, implementation=implementation)
        return jnp.sum(weights * jnp.sin(out)), out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "BLOCK", 8)
        grads, out = jax.grad(loss, has_aux=True)(qkv, "blocks")
    np.testing.assert_allclose(out, reference_attention(*qkv, None, segment_ids), rtol=1e-5, atol=1e-5)
    for ours, plain in zip(grads, jax.grad(loss, has_aux=True)(qkv, "plain")[0], strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_blocks_of_other_examples_are_skipped() -> None:
    segments = jnp.asarray([[[1, 1], [1, 2], [2, 2], [3, 3], [3, 4], [9, 9]]]).swapaxes(0, 1)
    assert block_attention._first_blocks(segments).tolist() == [0, 0, 1, 3, 3, 5]


def test_chunked_memory_does_not_grow_with_the_length_squared() -> None:
    def temporaries(length: int) -> int:
        shapes = [jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32) for heads in (14, 2, 2)]
        compiled = jax.jit(lambda q, k, v: attention(q, k, v, implementation="chunked")).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Scores of 32k x 32k for 14 heads are 56 GiB; held are at most a few chunks of 256 MiB and the padded inputs.
    assert temporaries(32_768) < 1.5 * 2**30
    assert temporaries(32_768) < 3 * temporaries(16_384)


def test_what_an_implementation_cannot_do_is_refused() -> None:
    query, key, value = arrays(1, 4, 4, 2, 2)
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="cudnn needs the lengths of the examples"):
        attention(query, key, value, segment_ids=ids, implementation="cudnn")
