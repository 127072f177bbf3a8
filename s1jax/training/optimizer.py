"""s1's optimiser: AdamW, linear warm-up and cosine decay, gradients clipped by their global norm."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from s1jax.model.qwen import Params, Qwen
from s1jax.training.config import OptimizerSection

_EPSILON = 1e-8


def learning_rate(section: OptimizerSection, total_steps: int) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The schedule as transformers counts it: the first optimiser step uses the value for step 0, which is 0.

    Linear from 0 over ceil(warmup_ratio x total_steps) steps, then half a cosine to 0 (s1 paper, App. D).
    """
    warmup = math.ceil(section.warmup_ratio * total_steps)

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        progress = (step - warmup) / max(1, total_steps - warmup)
        decayed = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return section.learning_rate * jnp.where(step < warmup, step / max(1, warmup), decayed)

    return schedule


def adamw(section: OptimizerSection, model: Qwen) -> optax.GradientTransformation:
    """Clipping, moments and decoupled weight decay, to be scaled by minus the learning rate.

    Biases and norms do not decay, as in transformers' Trainer. Moments are kept in `moments_dtype`.
    """

    def decays(params: Params) -> Params:
        axes_of, _ = model.split(model.axes())
        return jax.tree.map(_is_matrix, axes_of, is_leaf=lambda x: isinstance(x, tuple))

    return optax.chain(
        optax.clip_by_global_norm(section.max_grad_norm),
        _stored_as(jnp.dtype(section.moments_dtype), optax.scale_by_adam(section.beta1, section.beta2, _EPSILON)),
        optax.add_decayed_weights(section.weight_decay, mask=decays),
    )


def _stored_as(dtype: jnp.dtype, transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation with what it keeps of each parameter in `dtype` between steps, computed in float32."""

    def cast(state: optax.OptState, dtype: jnp.dtype) -> optax.OptState:
        def convert(leaf: Array) -> Array:
            return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(convert, state)

    def init(params: optax.Params) -> optax.OptState:
        return cast(transformation.init(params), dtype)

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        updates, state = transformation.update(updates, cast(state, jnp.dtype(jnp.float32)), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a parameter is a weight: it maps from or to the embedding or a rank; biases and norms do not."""
    return not {"embed", "rank", "divided_rank"}.isdisjoint(axes)
