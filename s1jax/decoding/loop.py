"""The compiled half of decoding: prefill into a cache, and a chunk of steps with budget forcing inside the graph.

Between the start and the end of a chunk nothing returns to the host: sampling, the automaton and the cache live in one
`lax.while_loop`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from s1jax.decoding.budget import Phase, RowParams, RowState, Tables, end_attempts, step
from s1jax.decoding.sampling import Draws, SamplingParams, sample, step_keys, survey, token_logprobs
from s1jax.mesh import constrain, platform
from s1jax.model.paged_attention import KVCache, PageTable, copy_page
from s1jax.model.qwen import Params, Qwen


class Rows(NamedTuple):
    """The rows of a batch between chunks; small, and handed over by the host each time."""

    state: RowState
    params: RowParams
    last_token: Int[Any, " batch"]
    """The last token of each row's context; its keys and values are not in the cache yet."""
    sampling: SamplingParams
    key_data: Int[Any, "batch two"]
    """Each row's request key (`sampling.request_key`), as raw threefry data."""


class Shared(NamedTuple):
    """What all rows of a run share, beside the model's parameters."""

    tables: Tables
    valid: Bool[Array, " vocab"]
    end_tokens: Int[Array, " ends"]


class Chunk(NamedTuple):
    """What the steps of one chunk wrote; a step that wrote nothing in a row has `written` False there."""

    tokens: Int[Array, "steps batch"]
    forced: Bool[Array, "steps batch"]
    written: Bool[Array, "steps batch"]
    attempts: Bool[Array, "steps batch"]
    """Whether an end of the thinking was drawn, whatever became of it."""
    logprobs: Float[Array, "steps batch"]
    """Under the model itself, forced tokens too; zeros unless asked for."""
    finite: Bool[Array, "steps batch"]
    """Whether all scores of the step were finite: what is drawn from others means nothing."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def empty_cache(model: Qwen, pages: int) -> KVCache:
    """A cache of so many pages, of all shards together."""
    return model.init_cache(pages)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    model: Qwen,
    params: Params,
    cache: KVCache,
    token_ids: Int[Any, "shards length"],
    first: Int[Any, " shards"],
    table: PageTable,
) -> KVCache:
    """The cache with a piece of a context for each shard of the batch, which computes its own, in a row's pages.

    `first` is the position of each piece's first token, with which a page begins. If it is 0 in all, the table may have
    pages for these tokens only, and attention then does not look for any before them.

    Always one row, so that a row's numbers do not depend on those it came with. What padding leaves behind a piece in
    its last page is out of sight, and overwritten before the row gets there; what has no page is not kept.
    """
    token_ids = constrain(jnp.asarray(token_ids), "batch", "length")
    positions = constrain(jnp.asarray(first)[:, None] + jnp.arange(token_ids.shape[1]), "batch", "length")
    _, filled = model.hidden_states(params, token_ids, positions, cache=cache, page_table=jnp.asarray(table))
    assert filled is not None
    return filled


@functools.partial(jax.jit, donate_argnums=0)
def copy_pages(cache: KVCache, source: Int[Any, " shards"], target: Int[Any, " shards"]) -> KVCache:
    """The cache with one page of each shard copied onto another."""
    return tuple(copy_page(layer, source, target) for layer in cache)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(6,))
def decode_chunk(
    model: Qwen,
    draws: Draws,
    steps: int,
    with_logprobs: bool,
    params: Params,
    shared: Shared,
    cache: KVCache,
    table: PageTable,
    rows: Rows,
) -> tuple[KVCache, RowState, Int[Array, " batch"], Chunk]:
    """Take `steps` steps, on a CPU fewer if every row finishes; the cache is updated in place.

    `draws` has what any row's sampling asks for. The table must have pages for `steps` more tokens of each row that is
    not finished. Returns the cache, the rows' states and last tokens, and what was written.
    """
    batch = rows.last_token.shape[0]
    keys = jax.random.wrap_key_data(rows.key_data, impl="threefry2x32")
    nothing = jnp.zeros((steps, batch), jnp.int32)
    chunk = Chunk(nothing, nothing > 0, nothing > 0, nothing > 0, nothing.astype(jnp.float32), nothing == 0)

    def more(carry: tuple[Array, KVCache, RowState, Array, Chunk]) -> Bool[Array, ""]:
        taken, _, state, _, _ = carry
        # A count that is known beforehand is kept by the host, which elsewhere would wait for each step's answer.
        return (taken < steps) & jnp.any(state.phase != Phase.DONE) if platform() == "cpu" else taken < steps

    def take(carry: tuple[Array, KVCache, RowState, Array, Chunk]) -> tuple[Array, KVCache, RowState, Array, Chunk]:
        taken, cache, state, last_token, chunk = carry
        positions = (state.length - 1)[:, None]
        hidden, new_cache = model.hidden_states(params, last_token[:, None], positions, cache=cache, page_table=table)
        assert new_cache is not None
        logits = constrain(model.logits(params, hidden[:, 0]), "batch", "vocab")
        own_keys = step_keys(keys, state.length)
        seen = survey(logits, shared.valid, shared.end_tokens, with_total=with_logprobs)
        sampled_from = rows.sampling, shared.valid, shared.end_tokens
        drawn, drawn_masked = sample(logits, seen.greatest, own_keys, draws, *sampled_from)
        attempts = end_attempts(state, shared.tables, drawn)
        state, token, forced, written = step(state, rows.params, shared.tables, drawn, drawn_masked)
        logprobs = token_logprobs(logits, seen.log_total, token) if with_logprobs else jnp.zeros(batch)
        now = Chunk(token, forced, written, attempts, logprobs, seen.finite)
        chunk = jax.tree.map(lambda all_steps, this: all_steps.at[taken].set(this), chunk, now)
        return taken + 1, new_cache, state, jnp.where(written, token, last_token), chunk

    start = (jnp.zeros((), jnp.int32), cache, rows.state, rows.last_token, chunk)
    _, cache, state, last_token, chunk = jax.lax.while_loop(more, take, start)
    return cache, state, last_token, chunk
