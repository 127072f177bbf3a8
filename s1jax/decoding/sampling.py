"""Samplers: one token per row from its logits, with the row's own key and settings: no row depends on its batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from s1jax.mesh import platform
from s1jax.model import cpu_kernel


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are drawn.

    The filters apply in transformers' order: temperature, top_k, top_p (of what top_k left), min_p.
    Raises ValueError, with every problem, for values out of range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 is greedy, where the filters have no effect."""
    top_k: int | None = None
    """Keep the so many most probable ids; of equal ones the lower ids."""
    top_p: float = 1.0
    """Keep the smallest set of most probable ids that together have at least this probability."""
    min_p: float = 0.0
    """Keep ids with at least this share of the most probable one's probability."""

    def __post_init__(self) -> None:
        problems = []
        # Below 1e-6 the scaled logits leave float32's range.
        if not (self.temperature == 0 or 1e-6 <= self.temperature < math.inf):
            problems.append(f"temperature: expected 0 or a number of at least 1e-6, found {self.temperature}")
        if not (self.top_k is None or (type(self.top_k) is int and self.top_k >= 1)):
            problems.append(f"top_k: expected None or a whole number of at least 1, found {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: expected more than 0 and at most 1, found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p: expected 0 to 1, found {self.min_p}")
        if problems:
            raise ValueError("; ".join(problems))


GREEDY = Sampling()


class SamplingParams(NamedTuple):
    """`Sampling` of each row."""

    temperature: Float[Any, " batch"]
    top_k: Int[Any, " batch"]
    """0 keeps all."""
    top_p: Float[Any, " batch"]
    min_p: Float[Any, " batch"]


@dataclass(frozen=True)
class Draws:
    """What the rows of a batch may ask of the sampler: static, so that what none asks for costs nothing."""

    greedy: bool = False
    whole: bool = False
    """Of the whole vocabulary, without top_k."""
    candidates: int = 0
    """The greatest top_k, or somewhat more."""
    top_p: bool = False
    min_p: bool = False

    def __or__(self, other: "Draws") -> "Draws":
        """What either asks for."""
        return Draws(
            self.greedy or other.greedy,
            self.whole or other.whole,
            max(self.candidates, other.candidates),
            self.top_p or other.top_p,
            self.min_p or other.min_p,
        )


def draws_of(sampling: Sampling) -> Draws:
    """What one row asks for."""
    if sampling.temperature == 0:
        return Draws(greedy=True)
    # A power of two: other settings of a later request are mostly no other program.
    candidates = 1 << (sampling.top_k - 1).bit_length() if sampling.top_k else 0
    return Draws(
        whole=sampling.top_k is None, candidates=candidates, top_p=sampling.top_p < 1, min_p=sampling.min_p > 0
    )


def sampling_params(samplings: Sequence[Sampling], size: int) -> SamplingParams:
    """The settings of rows, and greedy ones up to `size`."""
    rows = [*samplings, *[GREEDY] * (size - len(samplings))]
    return SamplingParams(
        np.array([row.temperature for row in rows], np.float32),
        np.array([row.top_k or 0 for row in rows], np.int32),
        np.array([row.top_p for row in rows], np.float32),
        np.array([row.min_p for row in rows], np.float32),
    )


def request_key(seed: int, request_index: int, sample_index: int) -> Key[Array, ""]:
    """Return the key of one sample of one request.

    Always threefry, whatever jax's default: under `vmap`, others give a row other numbers in another batch.
    Raises ValueError for a seed that does not fit 32 bits, which jax would cut in silence.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 to {2**32 - 1}, found {seed}")
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, request_index), sample_index)


def step_keys(request_keys: Key[Array, " batch"], positions: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """Return the key of each row's next draw, that of the token at `positions` in the row's own context."""
    return jax.vmap(jax.random.fold_in)(request_keys, positions)


class Survey(NamedTuple):
    """What is known of rows' scores as they are; what is not asked for costs nothing, but on a CPU, where little."""

    greatest: Int[Array, "batch two"]
    """The first of the valid ids with the greatest score, and of those that are no end tokens."""
    finite: Bool[Array, " batch"]
    """Whether all of a row's are: what is drawn from others means nothing."""
    log_total: Float[Array, " batch"]
    """The logarithm of the sum of their exponentials."""


def survey(
    logits: Float[Array, "batch vocab"],
    valid: Bool[Array, " vocab"] | Bool[np.ndarray, " vocab"],
    end_tokens: Int[Array, " ends"] | Int[np.ndarray, " ends"],
    *,
    with_total: bool = True,
) -> Survey:
    """Look through the scores once, in float32; `log_total` means something only `with_total`."""
    logits = logits.astype(jnp.float32)
    allowed = jnp.stack([jnp.asarray(valid), jnp.asarray(valid).at[end_tokens].set(False)])
    if cpu_kernel.available(logits.dtype):
        return Survey(*cpu_kernel.survey(logits, allowed, with_total=with_total))
    greatest = _argmax(jnp.where(allowed, logits[:, None], -jnp.inf))
    return Survey(greatest, jnp.isfinite(logits).all(axis=-1), jax.nn.logsumexp(logits, axis=-1))


def sample(
    logits: Float[Array, "batch vocab"],
    greatest: Int[Array, "batch two"],
    keys: Key[Array, " batch"],
    draws: Draws,
    params: SamplingParams,
    valid: Bool[Array, " vocab"] | Bool[np.ndarray, " vocab"],
    end_tokens: Int[Array, " ends"] | Int[np.ndarray, " ends"],
) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """Draw two ids per row: one from its distribution, one from the same with `end_tokens` masked.

    The two draws are independent, and only ids that are `valid` come out. The end tokens are masked before
    the filters, so the filters have other ids to choose from even where they would have left nothing but
    end tokens. Float32 throughout; `draws` is static, and has what any row asks for. Which of the two a row takes is
    for `budget.step` to say. Greedy rows take the `greatest` of their `survey`.
    """
    vocab = logits.shape[-1]
    logits = jnp.where(valid, logits.astype(jnp.float32), -jnp.inf)
    is_end = jnp.zeros(vocab, bool).at[end_tokens].set(True)
    greedy = params.temperature == 0
    drawn = greatest if draws.greedy else jnp.zeros_like(greatest)
    if draws.whole or draws.candidates:
        scores = logits - logits.max(axis=-1, keepdims=True)
        scores /= jnp.where(greedy, 1, params.temperature)[:, None]
    # Gumbel-max: the arg-max of scores plus Gumbel noise is a draw from their softmax. The "high" mode has
    # the far tail too, which a vocabulary of 150,000 does reach.
    if draws.whole:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (2, vocab), jnp.float32, mode="high"))(keys)
        both = jnp.stack([scores, jnp.where(is_end, -jnp.inf, scores)], 1)
        whole = _argmax(_filter(both, draws, params, is_sorted=False) + noise)
        drawn = jnp.where(greedy[:, None], drawn, whole)
    if draws.candidates:
        # Both draws come from one sort: without the end tokens, the rest is still in order. And however
        # many of the end tokens are among the first, top_k + ends candidates hold the top_k others.
        scores, ids = jax.lax.top_k(scores, min(draws.candidates + end_tokens.shape[0], vocab))
        both = jnp.stack([scores, jnp.where(is_end[ids], -jnp.inf, scores)], 1)
        # A candidate's noise is the same with more of them, which other rows may ask for.
        size = scores.shape[-1]
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (size, 2), jnp.float32, mode="high"))(keys)
        chosen = _argmax(_filter(both, draws, params, is_sorted=True) + noise.swapaxes(1, 2))
        among = jnp.take_along_axis(ids, chosen, axis=-1)
        drawn = jnp.where((greedy | (params.top_k == 0))[:, None], drawn, among)
    return drawn[:, 0], drawn[:, 1]


def _argmax(scores: Float[Array, "*rows candidates"]) -> Int[Array, "*rows"]:
    """Index of the first of the greatest scores."""
    if platform() != "cpu":
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    # A CPU looks for an index one score at a time, but for a maximum at many: so first for the block that has it.
    size = math.gcd(scores.shape[-1], 128)
    blocks = scores.reshape(*scores.shape[:-1], -1, size)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1, keepdims=True)
    inside = jnp.argmax(jnp.take_along_axis(blocks, block[..., None], axis=-2), axis=-1)
    return (block * size + inside)[..., 0].astype(jnp.int32)


def _filter(
    scores: Float[Array, "batch 2 candidates"], draws: Draws, params: SamplingParams, *, is_sorted: bool
) -> Float[Array, "batch 2 candidates"]:
    """Mask what the filters take away; sorted scores, at most 0, are in falling order, -inf anywhere."""
    top_k, top_p, min_p = (values[:, None, None] for values in params[1:])
    if is_sorted:
        rank = jnp.cumsum(scores > -jnp.inf, axis=-1)
        scores = jnp.where(rank <= top_k, scores, -jnp.inf)
    if draws.top_p:
        if is_sorted:
            # So few, in order already, that running sums are the cheaper way.
            probabilities = jax.nn.softmax(scores, axis=-1)
            kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        else:
            kept = most_probable(scores, top_p)
        scores = jnp.where(kept | (top_p >= 1), scores, -jnp.inf)
    if draws.min_p:
        scores = jnp.where(scores >= scores.max(axis=-1, keepdims=True) + jnp.log(min_p), scores, -jnp.inf)
    return scores


def most_probable(
    scores: Float[Array, "*rows vocab"], share: float | Float[Array, "..."]
) -> Bool[Array, "*rows vocab"]:
    """Which ids are in the smallest set of most probable ones whose probabilities add up to at least `share`.

    Of equal ones the lower ids; scores are at most 0. Nothing is sorted: an id is in the set if those before it have
    less than `share`, so the last one's score, and then its id, is found bit by bit, each by a sum over the vocabulary,
    of which every device may have its part.
    """
    probabilities = jax.nn.softmax(scores, axis=-1)
    # The bits of floats from 0 on, read as a whole number, are in the order of the floats.
    distances = jax.lax.bitcast_convert_type(jnp.abs(scores), jnp.uint32)
    ids = jnp.arange(scores.shape[-1], dtype=jnp.uint32)

    def last(before: Callable[[Array], Array], bits: int) -> Array:
        """The greatest number for which the ids before it have less than `share`."""

        def try_bit(i: Array, found: Array) -> Array:
            higher = found | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
            mass = jnp.where(before(higher), probabilities, 0).sum(axis=-1, keepdims=True)
            return jnp.where(mass < share, higher, found)

        return jax.lax.fori_loop(0, bits, try_bit, jnp.zeros((*scores.shape[:-1], 1), jnp.uint32))

    distance = last(lambda number: distances < number, 31)
    nearer, equal = distances < distance, distances == distance
    return nearer | (
        equal & (ids <= last(lambda number: nearer | (equal & (ids < number)), scores.shape[-1].bit_length()))
    )


def token_logprobs(
    logits: Float[Array, "batch vocab"], log_total: Float[Array, " batch"], ids: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    """Return each id's log-probability under the model itself: no temperature, filter or mask. Float32."""
    return jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0] - log_total
