"""Parts with gradients of their own, against what automatic differentiation makes of the formula."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s1jax.model.gates_and_norms import gated, normalised
from s1jax.model.projection import project

_CASES: dict[str, tuple[Callable[..., jax.Array], Callable[..., jax.Array], list[tuple[int, ...]]]] = {
    "projection": (
        lambda x, w: project(x, w, outputs_first=False),
        lambda x, w: jnp.einsum("ble,ehd->blhd", x, w),
        [(2, 5, 6), (6, 3, 4)],
    ),
    "projection of two dimensions": (
        lambda x, w: project(x, w, inputs=2, outputs_first=False),
        lambda x, w: jnp.einsum("blhd,hde->ble", x, w),
        [(2, 5, 3, 4), (3, 4, 6)],
    ),
    "projection stored with its outputs first": (
        lambda x, w: project(x, w, outputs_first=True),
        lambda x, w: jnp.einsum("ble,hde->blhd", x, w),
        [(2, 5, 6), (3, 4, 6)],
    ),
    "the same of many rows": (
        lambda x, w: project(x, w, outputs_first=True),
        lambda x, w: jnp.einsum("ble,he->blh", x, w),
        [(2, 50, 6), (7, 6)],
    ),
    "gated": (gated, lambda gate, up: gate / (1 + jnp.exp(-gate)) * up, [(2, 5, 6)] * 2),
    "normalised": (
        lambda x, scale: normalised(x, scale, 1e-3),
        lambda x, scale: x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-3) * scale,
        [(2, 5, 6), (6,)],
    ),
    "gated, many": (gated, lambda gate, up: gate / (1 + jnp.exp(-gate)) * up, [(3, 50, 130)] * 2),
    "normalised, many": (
        lambda x, scale: normalised(x, scale, 1e-3),
        lambda x, scale: x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-3) * scale,
        [(3, 50, 130), (130,)],
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", _CASES)
def test_values_and_gradients_are_those_of_the_formula(case: str, dtype: str) -> None:
    ours, formula, (of_x, of_second) = _CASES[case]
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], of_x).astype(dtype)
    # A weight and a scale are parameters, in float32 whatever the computation is in.
    second = jax.random.normal(keys[1], of_second).astype(dtype if case.startswith("gated") else "float32")
    out, back = jax.vjp(ours, x, second)
    # The same without gradients, within roundings.
    np.testing.assert_allclose(
        ours(x, second).astype(jnp.float32),
        out.astype(jnp.float32),
        rtol=1e-5 if dtype == "float32" else 0.02,
        atol=1e-5,
    )
    expected, expected_back = jax.vjp(formula, x.astype(jnp.float32), second.astype(jnp.float32))
    gradient = jax.random.normal(keys[2], out.shape).astype(dtype)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 0.05
    expecteds = (expected, *expected_back(gradient.astype(jnp.float32)))
    for a, b, like in zip((out, *back(gradient)), expecteds, (out, x, second), strict=True):
        assert a.dtype == like.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=tolerance, atol=tolerance * float(jnp.max(abs(b))))
