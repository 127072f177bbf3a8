"""Keys and values as integers with scales: what they are, and that what cannot be one is not hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s1jax.model.quantised_heads import quantised, widened
from tests.reference import quantisation


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_token_and_head_has_the_nearest_integers(dtype) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 7, 2, 16)) * 10.0 ** rng.integers(-6, 7, (3, 7, 2, 1))
    x[1, 2, 1] = 0
    x = jnp.asarray(x, dtype)
    integers, scales = jax.jit(quantised)(x)
    expected, of_tokens = quantisation.quantise(np.asarray(x, np.float32).reshape(-1, 16), "int8")
    np.testing.assert_array_equal(integers, expected.reshape(x.shape))
    np.testing.assert_allclose(scales, of_tokens.reshape(3, 7, 2), rtol=1e-6)
    assert np.abs(integers).max(axis=-1).tolist() == np.where(np.any(x != 0, axis=-1), 127, 0).tolist()
    # No number is further away than half of what the scale tells apart.
    away = np.abs(np.asarray(widened(quantised(x), jnp.float32)) - np.asarray(x, np.float32))
    assert np.all(away <= 0.5001 * np.asarray(scales)[..., None])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = jnp.ones((2, 1, 8)).at[1, 0, 3].set(bad)
    back = np.asarray(widened(quantised(x), jnp.float32))
    np.testing.assert_allclose(back[0], 1, rtol=1e-6)
    assert not np.isfinite(back[1, 0]).all()
