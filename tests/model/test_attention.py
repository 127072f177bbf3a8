"""Chunked attention against the plain one, and the plain one against the formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import make_splash_mha

from s1jax.data.examples import Example
from s1jax.data.packing import StepPlan, build_batch
from s1jax.model import accelerator_attention, block_attention
from s1jax.model import attention as module
from s1jax.model.accelerator_attention import lengths_and_offsets
from s1jax.model.attention import attention
from tests.reference.attention import reference_attention


def arrays(
    batch: int, length: int, key_length: int, heads: int, kv_heads: int, seed: int = 0, head_dim: int = 8
) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(batch, length, heads, head_dim), *[(batch, key_length, kv_heads, head_dim)] * 2]
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


def assert_equals_plain_with_gradients(implementation: str, length: int, head_dim: int, *, segments: bool) -> None:
    qkv = arrays(2, length, length, 4, 2, head_dim=head_dim)
    segment_ids = packed_segments(2, length) if segments else None

    def loss(qkv, implementation):
        out = attention(*qkv, segment_ids=segment_ids, implementation=implementation)
        return jnp.sum(jnp.sin(out)), out

    grads = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    found, plain = (jax.tree.leaves(grads(qkv, name)) for name in (implementation, "plain"))
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("length", [16, 40, 64])
@pytest.mark.parametrize("segments", [False, True])
def test_chunked_equals_plain_with_gradients(length: int, segments: bool) -> None:
    assert_equals_plain_with_gradients("chunked", length, 8, segments=segments)


@pytest.mark.parametrize("length", [128, 384, 512, 640])
@pytest.mark.parametrize("segments", [False, True])
def test_tpus_kernel_equals_plain_with_gradients(length: int, segments: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, in blocks of at most 256 tokens, which not all the rows are whole blocks of."""
    monkeypatch.setattr(accelerator_attention, "_TPU_BLOCK", 256)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", partial(make_splash_mha, interpret=True))
    assert_equals_plain_with_gradients("splash", length, 128, segments=segments)


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

    gradients = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "BLOCK", 8)
        grads, out = gradients(qkv, "blocks")
    np.testing.assert_allclose(out, reference_attention(*qkv, None, segment_ids), rtol=1e-5, atol=1e-5)
    for ours, plain in zip(grads, gradients(qkv, "plain")[0], strict=True):
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


@given(
    rows=st.lists(
        st.lists(st.integers(1, 40), max_size=16)
        | st.just([640])
        | st.just([])
        | st.lists(st.just(40), min_size=16, max_size=16),
        min_size=1,
        max_size=4,
    )
)
def test_cudnn_is_told_the_examples_that_the_segment_ids_tell(rows: list[list[int]]) -> None:
    """Rows without an example, with one token, full, of sixteen; what cuDNN is told lays out the same ids again."""
    examples = [Example(np.zeros(length, np.int32), np.ones(length, bool)) for row in rows for length in row]
    numbers = iter(range(len(examples)))
    batch = build_batch(
        examples,
        StepPlan(tuple(tuple(next(numbers) for _ in row) for row in rows), 640),
        num_microbatches=1,
        row_shard=(0, 1),
        most_segments=16,
        loss_average="sample",
        pad_id=0,
    )
    lengths, offsets = map(np.asarray, lengths_and_offsets(jnp.asarray(batch.segment_lengths[0])))
    assert lengths.shape == (len(rows), 16)
    assert offsets.shape == (len(rows), 17)
    told = np.zeros((len(rows), 640), np.int32)
    for row in range(len(rows)):
        for number, (start, length) in enumerate(zip(offsets[row], lengths[row], strict=False), start=1):
            assert (start < 0) == (length < 0)
            if length > 0:
                told[row, start : start + length] = number
    np.testing.assert_array_equal(told, batch.segment_ids[0])
