"""Scores that are NaN or infinite: weights may all be finite, and their products still overflow."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from s1jax.decoding.hosts import to_host
from s1jax.model.load import LoadedModel
from s1jax.model.qwen import Params, Qwen


class NonFiniteError(RuntimeError):
    """A model's scores for a text are not finite; the message names the text and where in the model that begins."""

    def __init__(self, text: str, loaded: LoadedModel, input_ids: Sequence[int]):
        """`input_ids` are those of the text. All processes that have the model take part."""
        with jax.set_mesh(loaded.mesh):
            finite = to_host(_finite(loaded.model, loaded.params, np.asarray([input_ids], np.int32)))
        places = ["the embeddings", *(f"layer {i}" for i in range(len(finite) - 2)), "the output head"]
        # A cache and whole rows may be attended to by different kernels.
        place = "nowhere if all its tokens are run at once" if finite.all() else f"first in {places[np.argmin(finite)]}"
        super().__init__(
            f"{text}: scores are NaN or infinite, computed in {jnp.dtype(loaded.model.dtype).name}; "
            f"such numbers come {place}"
        )


@functools.partial(jax.jit, static_argnums=0)
def _finite(model: Qwen, params: Params, input_ids: Int[Array, "one length"]) -> Bool[Array, " places"]:
    """Whether all numbers are finite in the embeddings, behind each layer, and in the scores."""
    states = model.between_layers(params, input_ids, jnp.arange(input_ids.shape[1])[None])
    hidden, _ = model.hidden_states(params, input_ids, jnp.arange(input_ids.shape[1])[None])
    # A few positions at a time, the last ones filled up with zeros: scores of all at once may have no room.
    chunks = jnp.pad(hidden[0], ((0, -hidden.shape[1] % 64), (0, 0))).reshape(-1, 64, hidden.shape[2])
    scores = jax.lax.map(lambda chunk: jnp.isfinite(model.logits(params, chunk)).all(), chunks)
    return jnp.stack([*(jnp.isfinite(x).all() for x in states), scores.all()])
