"""Log-probabilities of given tokens from hidden states, without ever holding the scores of the whole vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from s1jax.mesh import LOGICAL_AXES, constrain
from s1jax.model.qwen import Params, Qwen

_LOGITS_PER_CHUNK = 2**27
"""Scores that a device holds at once: 512 MiB in float32."""


def token_logprobs(
    model: Qwen,
    params: Params,
    hidden: Float[Array, "batch length hidden"],
    targets: Int[Array, "batch length"],
) -> tuple[Float[Array, "batch length"], Int[Array, "batch length"]]:
    """Log-probability of each target given the hidden state at its position, and the arg-max token there; float32.

    Computed over slices of the length, each computed again in the backward pass.
    """
    batch, length = targets.shape
    chunk = min(length, _chunk_length(model, batch))
    padding = -length % chunk

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def score(chunk_of: tuple[Array, Array]) -> tuple[Array, Array]:
        chunk_hidden, chunk_targets = chunk_of
        logits = model.logits(gathered, constrain(chunk_hidden, "batch", "length", None))
        logits = constrain(logits, "batch", "length", "vocab")
        # A comparison instead of a gather: it needs no communication when the vocabulary is sharded.
        is_target = jnp.arange(logits.shape[-1]) == chunk_targets[..., None]
        target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        return target_logits - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1)

    # Gathered over fsdp once, not for every slice; as stored, so that the slices' gradients add up in full precision.
    head = jax.tree.map(lambda of_tokens: constrain(of_tokens, "vocab", None), params[model.head_name])
    gathered = {model.head_name: head}
    hidden = constrain(hidden, "batch", "length", None)
    chunks = jax.lax.map(score, (split(hidden), split(targets)))
    logprobs, best = (jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in chunks)
    return logprobs, best


def _chunk_length(model: Qwen, batch: int) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    rows = batch
    for axis in LOGICAL_AXES["batch"]:
        rows //= shape.get(axis, 1)
    per_token = max(rows, 1) * model.config.vocab_size // shape.get("tensor", 1)
    return max(1, 1 << ((_LOGITS_PER_CHUNK // per_token).bit_length() - 1)) if per_token < _LOGITS_PER_CHUNK else 1
