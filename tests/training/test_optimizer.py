"""Moments that are kept in bfloat16 and computed in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.qwen import Qwen
from s1jax.training.config import OptimizerSection
from s1jax.training.optimizer import adamw
from s1jax.training.step import abstract_state, init_state
from tests.tiny import QWEN2, random_params

MODEL = Qwen(QwenConfig.from_hf(QWEN2), dtype=jnp.float32)


def moments(state: object) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]


def test_moments_are_rounded_between_steps_and_nothing_else_is() -> None:
    params = random_params(MODEL)
    gradients = jax.tree.map(lambda p: 0.01 * jnp.cos(100 * p), params)
    exact, rounded = (adamw(OptimizerSection(moments_dtype=dtype), MODEL) for dtype in ("float32", "bfloat16"))
    states = exact.init(params), rounded.init(params)
    for _ in range(3):
        # From the same moments both make the same updates, which are float32's.
        widened = jax.tree.map(lambda ours, like: ours.astype(like.dtype), states[1], states[0])
        expected, after = exact.update(gradients, widened, params)
        updates, kept = rounded.update(gradients, states[1], params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        for ours, theirs in zip(moments(kept), moments(after), strict=True):
            assert ours.dtype == jnp.bfloat16
            np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))
        states = after, kept


def test_the_state_has_two_thirds_of_the_bytes_and_is_the_one_that_is_planned() -> None:
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        section = OptimizerSection(moments_dtype=dtype)
        abstract = abstract_state(MODEL, section, mesh)
        state = init_state(MODEL, section, mesh, jax.device_put(random_params(MODEL), jax.devices()[0]))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), state
        )
        sizes[dtype] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert abs(sizes["bfloat16"] / sizes["float32"] - 2 / 3) < 1e-3
