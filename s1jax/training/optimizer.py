"""s1's optimiser: AdamW, linear warm-up and cosine decay, gradients clipped by their global norm."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from s1jax.config import OptimizerSection
from s1jax.model.qwen import Params, Qwen

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

    Biases and norms do not decay, as in transformers' Trainer.
    """

    def decays(params: Params) -> Params:
        return jax.tree.map(lambda axes: _is_matrix(axes), model.axes(), is_leaf=lambda x: isinstance(x, tuple))

    return optax.chain(
        optax.clip_by_global_norm(section.max_grad_norm),
        optax.scale_by_adam(section.beta1, section.beta2, _EPSILON),
        optax.add_decayed_weights(section.weight_decay, mask=decays),
    )


def _is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a parameter is a weight: it maps from or to the embedding; biases and norms do not."""
    return "embed" in axes
