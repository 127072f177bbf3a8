import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s1jax.model.projection import project

EQUATIONS = {"ble,ef->blf": (32, 48), "ble,ehd->blhd": (32, 4, 8), "blhd,hde->ble": (4, 8, 24)}


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 5)])
def test_half_precision_products_are_those_of_float32_rounded_once(equation: str, rows: tuple[int, int]) -> None:
    shape = EQUATIONS[equation]
    summed = shape[:2] if equation.startswith("blhd") else shape[:1]
    x = jax.random.normal(jax.random.key(0), (*rows, *summed)).astype(jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), shape).astype(jnp.bfloat16)
    product = jax.jit(lambda x, w: project(equation, x, w))(x, weight)
    assert product.dtype == jnp.bfloat16
    exact = np.einsum(equation, np.asarray(x, np.float64), np.asarray(weight, np.float64))
    np.testing.assert_allclose(np.asarray(product, np.float64), exact, rtol=2**-8, atol=1e-6)


def test_no_float32_copy_of_a_weight_is_made_on_a_cpu() -> None:
    weight = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    for rows in (1, 8):
        x = jax.ShapeDtypeStruct((rows, 1, 256), jnp.bfloat16)
        text = jax.jit(lambda x, w: project("ble,ef->blf", x, w)).lower(x, weight).compile().as_text()
        assert "f32[256,512]" not in text
