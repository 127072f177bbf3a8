import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.model import cpu_kernel
from s1jax.model.projection import look_up, project
from tests.reference import quantisation as reference

SHAPES = {"matrix": ((32,), (48,)), "to heads": ((32,), (4, 8)), "from heads": ((4, 8), (24,))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outputs_first", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 5), (5, 20)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_products_are_those_of_float64_rounded_once(
    shape: str, outputs_first: bool, rows: tuple[int, int], dtype: type
) -> None:
    inputs, outputs = SHAPES[shape]
    x = jax.random.normal(jax.random.key(0), (*rows, *inputs)).astype(dtype)
    weight = jax.random.normal(jax.random.key(1), (*inputs, *outputs)).astype(dtype)
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(weight, np.float64), len(inputs))
    if outputs_first:
        weight = jnp.moveaxis(weight, range(len(inputs)), range(-len(inputs), 0))
    product = jax.jit(lambda x, w: project(x, w, inputs=len(inputs), outputs_first=outputs_first))(x, weight)
    assert product.dtype == dtype
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(product, np.float64), exact, rtol=epsilon, atol=max(1e-5, epsilon / 100))


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("outputs_first", [False, True])
def test_no_float32_copy_of_a_weight_is_made_on_a_cpu(rows: int, outputs_first: bool) -> None:
    weight = jax.ShapeDtypeStruct((512, 256) if outputs_first else (256, 512), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((rows, 1, 256), jnp.bfloat16)
    compiled = jax.jit(lambda x, w: project(x, w, outputs_first=outputs_first)).lower(x, weight).compile()
    assert "f32[256,512]" not in compiled.as_text()
    assert "f32[512,256]" not in compiled.as_text()


def widening(x: jax.Array, weight: jax.Array) -> jax.Array:
    return project(x, weight, outputs_first=True)


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_a_bfloat16_weight_under_float32_has_the_products_of_its_float32_copy(rows: int) -> None:
    x = jax.random.normal(jax.random.key(0), (rows, 96))
    weight = jax.random.normal(jax.random.key(1), (40, 96)).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    for stored in (weight, weight.astype(jnp.float32)):
        np.testing.assert_allclose(jax.jit(widening)(x, stored), exact, rtol=1e-5, atol=2e-5)


needs_tiles = pytest.mark.skipif(not cpu_kernel.has_tiles(), reason="the kernels have no matrix units here")
needs_pairs = pytest.mark.skipif(not cpu_kernel.has_pairs(), reason="the kernels multiply no pairs of bfloat16 here")
# With the dtypes of x and of the weight.
PRODUCTS = [
    pytest.param(cpu_kernel.multiply, jnp.float32, jnp.float32, id="float32"),
    pytest.param(cpu_kernel.multiply, jnp.float32, jnp.bfloat16, id="mixed"),
    pytest.param(cpu_kernel.multiply, jnp.bfloat16, jnp.bfloat16, marks=needs_pairs, id="pairs"),
    pytest.param(cpu_kernel.multiply_by_tiles, jnp.bfloat16, jnp.bfloat16, marks=needs_tiles, id="tiles"),
]


@pytest.mark.parametrize(("multiply", "dtype", "of_weight"), PRODUCTS)
@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 80),
    # More than are computed at once, too.
    inputs=st.integers(1, 200) | st.integers(850, 2000),
    outputs=st.integers(1, 400),
    seed=st.integers(0, 9),
)
def test_the_kernels_multiply_any_shape(
    multiply: Callable, dtype: type, of_weight: type, rows: int, inputs: int, outputs: int, seed: int
) -> None:
    assert cpu_kernel.available(of_weight)
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    weight = jnp.asarray(rng.normal(size=(outputs, inputs)), of_weight)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    # Rounding errors add up like a random walk.
    atol = 2e-5 * max(1.0, inputs / 200) ** 0.5
    product = multiply(x, weight)
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=atol)
    if multiply == cpu_kernel.multiply_by_tiles:
        rounded = multiply(x, weight, dtype=jnp.bfloat16)
        np.testing.assert_array_equal(rounded, product.astype(jnp.bfloat16))


@needs_tiles
@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 80),
    inputs=st.integers(1, 200) | st.integers(850, 2000),
    outputs=st.integers(1, 400),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 9),
)
def test_gated_products_of_any_shape(rows: int, inputs: int, outputs: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.bfloat16)
    gate, up = (jnp.asarray(rng.normal(size=(outputs, inputs)) * scale, jnp.bfloat16) for _ in range(2))
    product = cpu_kernel.multiply_gated(x, gate, up)
    of_gate, of_up = (np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T for weight in (gate, up))
    exact = of_gate / (1 + np.exp(-of_gate)) * of_up
    # Beside the rounding to bfloat16, what errors of a gate's sum do to it.
    atol = 1e-3 * scale**2 * max(1.0, inputs / 200)
    np.testing.assert_allclose(product.astype(np.float64), exact, rtol=2**-8, atol=atol)
    for count in (1, 16, 17, 33):
        np.testing.assert_array_equal(cpu_kernel.multiply_gated(x[:count], gate, up), product[:count])


@needs_tiles
def test_what_is_no_number_stays_so_in_a_gated_product() -> None:
    x = jnp.asarray([[1.0], [jnp.nan], [jnp.inf], [-jnp.inf]], jnp.bfloat16)
    one = jnp.ones((1, 1), jnp.bfloat16)
    assert np.isfinite(cpu_kernel.multiply_gated(x, one, one)).tolist() == [[True], [False], [False], [False]]


@pytest.mark.parametrize(("multiply", "dtype", "of_weight"), PRODUCTS)
def test_the_numbers_of_a_row_do_not_depend_on_the_rows_beside_it(
    multiply: Callable, dtype: type, of_weight: type
) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(41, 2000)), dtype)
    weight = jnp.asarray(rng.normal(size=(50, 2000)), of_weight)
    together = multiply(x, weight)
    for count in (1, 3, 8, 9, 17, 33):
        np.testing.assert_array_equal(multiply(x[:count], weight), together[:count])


@pytest.mark.parametrize(
    "dtype", [jnp.float16, *([] if cpu_kernel.has_pairs() else [jnp.bfloat16])], ids=lambda dtype: dtype.__name__
)
def test_what_the_kernel_does_not_multiply_is_refused(dtype: type) -> None:
    assert cpu_kernel.available(jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no product is made of an x of this type"):
        jax.block_until_ready(cpu_kernel.multiply(jnp.ones((2, 40), dtype), jnp.ones((3, 40))))


@needs_pairs
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 20),
    outputs=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 9),
)
def test_pairs_of_bfloat16_beside_integers(rows: int, groups: int, outputs: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    each = int(rng.choice([16, 32, 64, 128] if bits == 4 else [1, 9, 32, 45]))
    most = 2 ** (bits - 1)
    x = jnp.asarray(rng.normal(size=(rows, groups * each)), jnp.bfloat16)
    integers = rng.integers(1 - most, most, (outputs, groups * each))
    scales = rng.uniform(0.5, 2, (outputs, groups if bits == 4 else 1)).astype(np.float32)
    stored = jnp.asarray(integers, jnp.int4 if bits == 4 else jnp.int8)
    product = cpu_kernel.multiply(x, stored, jnp.asarray(scales))
    # Integers of eight bits are bfloat16 themselves. Those of four are rounded with their scales.
    weight = reference.widened(integers, scales)
    if bits == 4:
        weight = np.asarray(jnp.asarray(weight, jnp.bfloat16), np.float64)
    exact = np.asarray(x, np.float64) @ weight.T
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-5 * most * (groups * each) ** 0.5)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    queries=st.integers(1, 17),
    pages=st.integers(1, 6),
    slots=st.integers(1, 70),
    head_dim=st.integers(1, 140),
    half=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 9),
)
def test_the_kernel_attends_over_the_slots_up_to_the_last(
    batch: int, kv_heads: int, queries: int, pages: int, slots: int, head_dim: int, half: bool, scale: float, seed: int
) -> None:
    dtype = jnp.bfloat16 if half else jnp.float32
    rng = np.random.default_rng(seed)
    query = jnp.asarray(rng.normal(size=(batch, kv_heads, queries, head_dim)) * scale / head_dim**0.5, jnp.float32)
    keys, values = (rng.normal(size=(batch, kv_heads, pages * slots, head_dim)) for _ in range(2))
    last = rng.integers(0, pages * slots, batch)
    for row in range(batch):  # What lies behind the last one is never read.
        keys[row, :, last[row] + 1 :] = values[row, :, last[row] + 1 :] = np.nan
    keys, values = jnp.asarray(keys, dtype), jnp.asarray(values, dtype)
    table = rng.permutation(batch * pages).reshape(batch, pages)

    def in_pages(x: jax.Array) -> jax.Array:
        of_rows = x.reshape(batch, kv_heads, pages, slots, head_dim).swapaxes(0, 1)
        return jnp.zeros((kv_heads, batch * pages, slots, head_dim), dtype).at[:, table].set(of_rows)

    context = cpu_kernel.attend(query, in_pages(keys), in_pages(values), jnp.asarray(table), jnp.asarray(last))
    for row in range(batch):
        seen = slice(0, last[row] + 1)
        scores = np.einsum(
            "kqd,ksd->kqs", np.asarray(query[row], np.float64), np.asarray(keys[row, :, seen], np.float64)
        )
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        expected = np.einsum("kqs,ksd->kqd", weights, np.asarray(values[row, :, seen], np.float64))
        np.testing.assert_allclose(context[row], expected, rtol=1e-4, atol=2e-5)


_PROGRAM = """
import jax.numpy as jnp
from s1jax.model.projection import look_up, project
print(project(jnp.ones((2, 1, 40)), jnp.ones((3, 40)), outputs_first=True).tolist())
"""


def run_in(environment: dict[str, str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "-c", _PROGRAM], env=env, check=True, capture_output=True, text=True)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_products_are_xlas_and_a_line_says_so(compiler: str, tmp_path: Path) -> None:
    run = run_in({"CXX": compiler}, tmp_path)
    assert run.stdout.strip() == str([[[40.0] * 3]] * 2)
    assert run.stderr.count("slower than it could be") == 1
    assert compiler in run.stderr


def test_the_kernel_is_compiled_once_and_kept(tmp_path: Path) -> None:
    for _ in range(2):
        run = run_in({}, tmp_path)
        assert run.stdout.strip() == str([[[40.0] * 3]] * 2)
        assert "slower" not in run.stderr
        (library,) = (tmp_path / "s1jax" / "compiled").iterdir()
        changed = library.stat().st_mtime_ns
    assert library.suffix == ".so"
    assert changed == library.stat().st_mtime_ns


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_looking_up_has_values_and_gradients_of_indexing_and_copies_no_table(dtype: type) -> None:
    table = jax.random.normal(jax.random.key(0), (5000, 8)).astype(dtype)
    ids = jnp.array([[3, 4999], [3, 0]])

    def loss(look):
        return lambda table: jnp.sum(look(table, ids).astype(jnp.float32) ** 2)

    def same(table: jax.Array, ids: jax.Array) -> jax.Array:
        return look_up(table, ids, table.dtype)

    np.testing.assert_array_equal(same(table, ids), table[ids])
    ours, theirs = jax.grad(loss(same))(table), jax.grad(loss(lambda table, ids: table[ids]))(table)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, theirs)
    if dtype == jnp.bfloat16:
        assert "f32[5000,8]" not in jax.jit(same).lower(table, ids).compile().as_text()

    def repeated(table: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda turn, total: total + same(table, ids + turn), same(table, ids))

    in_loop = jax.jit(repeated).lower(table, ids).compile()
    assert in_loop.memory_analysis().temp_size_in_bytes < table.nbytes / 2
