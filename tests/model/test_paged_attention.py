"""Writing to pages and attending over them, by every implementation, against the formula over what rows hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.gpu import paged_attention as of_gpus

from s1jax.mesh import batch_shards, make_mesh
from s1jax.model import cpu_kernel
from s1jax.model.accelerator_attention import cudnn_paged_attention
from s1jax.model.paged_attention import PAGE, LayerCache, copy_page, num_pages, paged_attention, write
from s1jax.model.quantised_heads import Quantised
from tests.reference import quantisation
from tests.reference.attention import reference_attention


def unwritten(shape: tuple[int, int, int, int], dtype, cache_dtype: str | None) -> LayerCache:
    """Pages of which nothing is a number that was not written, or its scale is not."""
    if cache_dtype is None:
        return LayerCache(*(jnp.full(shape, jnp.nan, dtype) for _ in range(2)))
    return LayerCache(*(Quantised(jnp.full(shape, 99, jnp.int8), jnp.full(shape[:3], jnp.nan)) for _ in range(2)))


def random(rng, shape: tuple[int, ...], dtype=jnp.float32):
    """Keys or values, none of which lies between two integers of int8, where rounding would decide which is nearer."""
    x = jnp.asarray(rng.normal(size=shape), dtype)
    while True:
        wide = np.asarray(x, np.float64)
        steps = wide / np.abs(wide).max(-1, keepdims=True) * quantisation.GREATEST["int8"]
        between = np.abs(steps - np.floor(steps) - 0.5) < 1e-3
        if not between.any():
            return x
        x = jnp.where(between, jnp.asarray(rng.normal(size=shape), dtype), x)


def as_read(x, cache_dtype: str | None):
    """Keys or values as they come back from a cache of this dtype, whose numbers are rounded one by one."""
    if cache_dtype is None:
        return x
    rows = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
    return quantisation.widened(*quantisation.quantise(rows, cache_dtype)).reshape(x.shape)


def filled(
    rng, mesh, lengths: list[int], shape: tuple[int, int, int], dtype=jnp.float32, cache_dtype: str | None = None
):
    """Queries, keys and values of rows of these lengths, and a cache that they were written to, page by random page.

    Keys and values are as they are read.
    """
    heads, kv_heads, head_dim = shape
    batch, longest = len(lengths), max(lengths)
    query = rng.normal(size=(batch, 1, heads, head_dim))
    key, value = (random(rng, (batch, longest, kv_heads, head_dim), dtype) for _ in range(2))
    shards, width = batch_shards(mesh), num_pages(longest) + 1
    per_shard = batch // shards
    table = np.zeros((batch, width), np.int32)
    for shard in range(shards):
        free = iter(rng.permutation(np.arange(1, per_shard * width + 1)))
        for row in range(shard * per_shard, (shard + 1) * per_shard):
            for page in range(num_pages(lengths[row])):
                table[row, page] = next(free)
    # Nothing that no row has is ever looked at.
    pages = (max(kv_heads, mesh.shape["tensor"]), shards * (per_shard * width + 1), PAGE, head_dim)
    cache = unwritten(pages, dtype, cache_dtype)
    # Several tokens first, and what is left one at a time.
    begun = min(lengths) // 2 + 1
    last = np.asarray(lengths) - 1
    with jax.set_mesh(mesh):
        positions = np.tile(np.arange(begun), (batch, 1))
        if begun > 1:
            cache = jax.jit(write)(cache, key[:, :begun], value[:, :begun], table, positions)
        one = jax.jit(write)
        for position in range(0 if begun == 1 else begun, longest):
            at = np.minimum(position, last)
            rows = np.arange(batch)
            cache = one(cache, key[rows, at][:, None], value[rows, at][:, None], table, at[:, None])
    key, value = as_read(key, cache_dtype), as_read(value, cache_dtype)
    return jnp.asarray(query, dtype), key, value, cache, jnp.asarray(table), jnp.asarray(last, jnp.int32)


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=3),
    implementation=st.sampled_from(["kernel", "plain"]),
    groups=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 9),
    cache_dtype=st.sampled_from([None, "int8"]),
)
def test_a_token_sees_what_its_row_has_written(
    lengths, implementation, groups: int, seed: int, cache_dtype: str | None
) -> None:
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    if implementation == "kernel":
        with jax.set_mesh(mesh):
            assert cpu_kernel.available(jnp.float32)
    rng, shape = np.random.default_rng(seed), (2 * groups, 2, 16)
    query, key, value, cache, table, last = filled(rng, mesh, lengths, shape, cache_dtype=cache_dtype)
    expected = reference_attention(query, key, value, last[:, None], None)
    with jax.set_mesh(mesh):
        out = jax.jit(paged_attention, static_argnames="implementation")(
            query, cache, table, last[:, None], implementation=implementation
        )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "tensor", "implementation", "cache_dtype"),
    [
        (1, 1, "kernel", None),
        (1, 1, "plain", None),
        (2, 1, "auto", None),
        (2, 4, "auto", None),
        (1, 1, "kernel", "int8"),
        (2, 4, "auto", "int8"),
    ],
)
@pytest.mark.parametrize("pieces", [[2, 1], [1, 1, 1], [15, 2, 3], [3, 16]])
def test_tokens_that_follow_others_see_those_and_themselves(
    data: int, tensor: int, implementation: str, cache_dtype: str | None, pieces: list[int]
) -> None:
    """Of each row pieces of so many pages; what is in no page of the second row's is padding."""
    mesh = make_mesh(data, 1, tensor, jax.devices()[: data * tensor])
    rng = np.random.default_rng(0)
    length, heads, kv_heads, head_dim = sum(pieces) * PAGE, 8, 2, 16
    lengths = [length, length - (pieces[-1] - 1) * PAGE]
    query = rng.normal(size=(2, length, heads, head_dim)).astype(np.float32)
    key, value = random(rng, (2, 2, length, kv_heads, head_dim))
    width = sum(pieces) + 3
    own = np.arange(1, 2 * width + 1).reshape(2, width) if data == 1 else np.tile(np.arange(1, width + 1), (2, 1))
    table = np.where(np.arange(width) < np.array([lengths]).T // PAGE, own, 0).astype(np.int32)
    shape = (max(kv_heads, tensor), 2 * width + data, PAGE, head_dim)
    cache = unwritten(shape, jnp.float32, cache_dtype)
    outs, first = [], 0
    with jax.set_mesh(mesh):
        for piece in pieces:
            now = slice(first, first + piece * PAGE)
            positions = np.tile(np.arange(now.start, now.stop, dtype=np.int32), (2, 1))
            cache = jax.jit(write)(cache, key[:, now], value[:, now], table, positions)
            attend = jax.jit(paged_attention, static_argnames="implementation")
            outs.append(attend(query[:, now], cache, table, positions, implementation=implementation))
            first = now.stop
    out = np.concatenate(outs, axis=1)
    key, value = as_read(key, cache_dtype), as_read(value, cache_dtype)
    expected = reference_attention(query, key, value, np.tile(np.arange(length), (2, 1)), None)
    for row, own_length in enumerate(lengths):
        np.testing.assert_allclose(out[row, :own_length], expected[row, :own_length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(2, 2, 2), (2, 1, 4), (1, 4, 1)])
def test_each_shard_has_pages_of_its_own_and_heads_are_repeated_where_there_are_few(
    data: int, fsdp: int, tensor: int, cache_dtype: str | None
) -> None:
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])
    lengths = [5, 70, 64, 65, 1, 130, 20, 66]
    rng, shape = np.random.default_rng(0), (8, 2, 16)
    query, key, value, cache, table, last = filled(rng, mesh, lengths, shape, cache_dtype=cache_dtype)
    with jax.set_mesh(mesh):
        out = jax.jit(paged_attention)(query, cache, table, last[:, None])
    expected = reference_attention(query, key, value, last[:, None], None)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["kernel", "plain"])
def test_int8_pages_stand_for_the_nearest_of_a_heads_127_parts(implementation: str) -> None:
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    lengths = [1, PAGE, PAGE + 1, 2 * PAGE + 3]
    rng = np.random.default_rng(0)
    query, key, value, cache, table, last = filled(rng, mesh, lengths, (14, 2, 24), cache_dtype="int8")
    assert isinstance(cache.keys, Quantised)
    assert cache.keys.integers.dtype == jnp.int8
    with jax.set_mesh(mesh):
        assert cpu_kernel.available(jnp.int8)
        attend = jax.jit(partial(paged_attention, implementation=implementation))
        out = attend(query, cache, table, last[:, None])
        alone = [attend(query[i : i + 1], cache, table[i : i + 1], last[i : i + 1, None])[0] for i in range(4)]
    expected = reference_attention(query, key, value, last[:, None], None)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    if implementation == "kernel":
        np.testing.assert_array_equal(out, alone)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_all_of_a_page_is_copied_and_nothing_else(cache_dtype: str | None) -> None:
    mesh = make_mesh(2, 1, 1, jax.devices()[:2])
    *_, cache, table, _ = filled(np.random.default_rng(0), mesh, [PAGE, 90], (2, 2, 8), cache_dtype=cache_dtype)
    cache = jax.tree.map(jnp.nan_to_num, cache)
    pages = cache.values.integers.shape[1] if isinstance(cache.values, Quantised) else cache.values.shape[1]
    source, target = np.asarray(table[:, 0]), np.array([0, 0], np.int32)
    with jax.set_mesh(mesh):
        copied = jax.jit(copy_page)(cache, source, target)
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(copied), strict=True):
        expected = np.array(before)
        for shard in range(2):
            first = shard * pages // 2
            expected[:, first] = before[:, first + source[shard]]
        np.testing.assert_array_equal(after, expected)


def test_the_kernel_of_gpus_for_int8_pages_computes_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted."""
    monkeypatch.setattr(of_gpus, "paged_attention", partial(of_gpus.paged_attention, interpret=True))
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    lengths = [5, 70, 64, 130]
    rng, shape = np.random.default_rng(0), (10, 2, 64)
    query, key, value, cache, table, last = filled(rng, mesh, lengths, shape, jnp.bfloat16, "int8")
    cache = jax.tree.map(jnp.nan_to_num, cache)
    out = jax.jit(partial(paged_attention, implementation="cudnn"))(query, cache, table, last[:, None])
    expected = reference_attention(query, key, value, last[:, None], None)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=2e-2, atol=2e-2)


def test_cudnn_is_given_pages_by_whatever_version_of_jax_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered: nothing here can run it."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(
        fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0"
    )
    shapes = ((4, 2, 5, 128), (2, 17, 64, 128), (2, 17, 64, 128), (4, 8), (4,))
    arguments = [jax.ShapeDtypeStruct(x, jnp.bfloat16 if len(x) == 4 else jnp.int32) for x in shapes]
    lowered = jax.jit(cudnn_paged_attention).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "__cudnn$fmhaSoftmax" in lowered.as_text()


def test_the_kernel_of_tpus_computes_the_formula() -> None:
    """Interpreted."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    lengths = [5, 70, 64, 130]
    query, key, value, cache, table, last = filled(np.random.default_rng(0), mesh, lengths, (4, 2, 128), jnp.bfloat16)
    cache = jax.tree.map(jnp.nan_to_num, cache)
    with pltpu.force_tpu_interpret_mode():
        splash = jax.jit(paged_attention, static_argnames="implementation")
        out = splash(query, cache, table, last[:, None], implementation="splash")
    expected = reference_attention(query, key, value, last[:, None], None)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=2e-2, atol=2e-2)
