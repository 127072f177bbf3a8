"""Lengths of the training examples that a plan is made for, read or assumed."""

from statistics import NormalDist

import numpy as np
from jaxtyping import Int

from s1jax.data.examples import load_examples
from s1jax.paths import any_path
from s1jax.planning.hardware import PlanError
from s1jax.tokenizer import load_tokenizer
from s1jax.training.config import TrainConfig

_EXAMPLES_SIGMA = 0.3
"""Spread of the logarithm of a length. With s1K's mean and longest it puts 26% below 4,096 tokens, as the s1 paper's
table 8 does."""


def example_lengths(config: TrainConfig) -> tuple[Int[np.ndarray, " examples"], str]:
    """Tokens of each example, and in words where that is known from.

    Read where the data is a file and the model's directory has a tokenizer, else as the `plan` section says.
    Raises PlanError or InputError if neither is possible.
    """
    block_size = config.data.block_size
    if any_path(config.data.path).is_file() and any_path(config.model.path).is_dir():
        tokenizer = load_tokenizer(config.model.path)
        dataset = load_examples(config.data.path, tokenizer, block_size=block_size, overlong=config.data.overlong)
        return np.array([example.input_ids.size for example in dataset.examples]), f"read from {config.data.path}"
    count, mean = config.plan.num_examples, config.plan.mean_length
    longest = min(config.plan.max_length or block_size, block_size)
    if mean is None:
        return np.full(count, block_size), f"assumed: {count:,} examples of data.block_size"
    if not 2 <= mean <= longest:
        raise PlanError(f"plan.mean_length ({mean}) must be from 2 to the longest example ({longest})")
    text = f"assumed (plan.*): {count:,} examples of {mean:,} tokens on average, at most {longest:,}"
    return log_normal(count, mean, longest, _EXAMPLES_SIGMA), text


def log_normal(count: int, mean: int, longest: int, sigma: float) -> Int[np.ndarray, " examples"]:
    """The quantiles of a log-normal distribution cut off at `longest`, scaled to have this mean."""
    normal = NormalDist()
    spread = np.exp(sigma * np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)]))
    low, high = 1.0, float(longest)
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(scale * spread, longest).mean() < mean else (low, scale)
    return np.clip(np.rint(low * spread), 2, longest).astype(np.int64)
