import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from s1jax.decoding.sampling import (
    Draws,
    Sampling,
    draws_of,
    most_probable,
    request_key,
    sample,
    sampling_params,
    step_keys,
    survey,
    token_logprobs,
)
from s1jax.mesh import make_mesh, named_sharding
from s1jax.planning.hlo import Program

VOCAB = 24
PADDING = np.arange(20, VOCAB)
VALID = ~np.isin(np.arange(VOCAB), PADDING)
ENDS = np.array([3, 11])
NO_ENDS = np.array([], np.int32)
LOGITS = 1.5 * np.random.default_rng(3).normal(size=VOCAB).astype(np.float32)
# A model whose padding rows and end tokens are what it likes best.
LOGITS[PADDING] = 9
LOGITS[ENDS] = LOGITS[VALID].max() + np.array([0.7, 0.3])

SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.0, top_k=100),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=0.8, top_k=6, top_p=0.8),
    Sampling(temperature=1.2, top_k=10, top_p=0.9, min_p=0.1),
]


def distribution(sampling: Sampling, masked: bool) -> np.ndarray:
    """The exact probabilities: mask, temperature, top_k, top_p, min_p, one after the other."""
    scores = LOGITS.astype(float) / sampling.temperature
    allowed = VALID & ~(np.isin(np.arange(VOCAB), ENDS) & masked)
    p = np.where(allowed, np.exp(scores), 0)
    p /= p.sum()
    order = np.argsort(-p)
    if sampling.top_k is not None:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    kept = np.searchsorted(np.cumsum(p[order]), sampling.top_p) + 1
    p[order[kept:]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


SCORES = [0.0, -0.0, -1e-45, -0.5, -1.0, -1.0000001, -3.0, -20.0, -200.0, -3e38, -np.inf]


@functools.partial(jax.jit, static_argnames="draws")
def sample_compiled(logits, keys, draws, params, valid, ends):
    return sample(logits, survey(logits, valid, ends).greatest, keys, draws, params, valid, ends)


survey_compiled = jax.jit(survey)
most_probable_compiled = jax.jit(most_probable, static_argnums=1)


COUNT = 20_000


def draws(sampling: Sampling, seed: int = 0, logits=LOGITS, ends=ENDS) -> np.ndarray:
    """Both draws of COUNT rows that differ in nothing but their position. [2, COUNT]"""
    keys = step_keys(jnp.broadcast_to(request_key(seed, 0, 0), (COUNT,)), jnp.arange(COUNT))
    batch = jnp.broadcast_to(jnp.asarray(logits), (COUNT, VOCAB))
    params = sampling_params([sampling] * COUNT, COUNT)
    return np.stack(sample_compiled(batch, keys, draws_of(sampling), params, VALID, ends))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_have_the_exact_distribution(sampling):
    for ids, masked in zip(draws(sampling), (False, True), strict=True):
        expected = distribution(sampling, masked) * COUNT
        observed = np.bincount(ids, minlength=VOCAB)
        support = expected > 0
        assert observed[~support].sum() == 0
        if support.sum() > 1:
            assert stats.chisquare(observed[support], expected[support]).pvalue > 1e-3


@given(
    st.sampled_from([1, 2, 37, 300]).flatmap(
        lambda size: arrays.arrays(np.float32, (2, size), elements=st.sampled_from(SCORES))
    ),
    st.sampled_from([0.001, 0.3, 0.5, 0.95, 0.999]),
)
def test_the_most_probable_ids_are_those_of_a_sort(scores, share):
    scores[:, -1] = 0
    for row, kept in zip(scores, np.asarray(most_probable_compiled(scores, share)), strict=True):
        order = np.argsort(-row, kind="stable")
        p = np.exp(row[order].astype(float))
        before = np.concatenate([[0], np.cumsum(p / p.sum())[:-1]])
        # What sums in float32 cannot tell is left to them.
        assert kept[order][before < share - 1e-5].all()
        assert not kept[order][before > share + 1e-5].any()
        assert (np.diff(kept[order].astype(int)) <= 0).all()


def test_a_vocabulary_in_parts_is_not_gathered():
    logits = jax.ShapeDtypeStruct(
        (8, 8192), jnp.float32, sharding=named_sharding(make_mesh(1, 2, 8), ("batch", "vocab"), (8, 8192))
    )
    keys = jax.eval_shape(lambda: jax.random.split(request_key(0, 0, 0), 8))
    sampling = Sampling(temperature=1.0, top_p=0.9)
    params = sampling_params([sampling] * 8, 8)
    lowered = sample_compiled.lower(logits, keys, draws_of(sampling), params, np.ones(8192, bool), ENDS)
    exchanged = [collective.num_bytes for collective in Program(lowered.compile().as_text()).collectives]
    # Sums and maxima of rows, and the 128 scores of the block that has a row's greatest; logits are 262,144 bytes.
    assert 0 < max(exchanged) <= 4 * 8 * 2 * 128


def test_equal_scores_are_kept_from_the_lowest_id_on():
    kept = np.asarray(most_probable(jnp.zeros((2, 8)), 0.4))
    np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(8) < 4, (2, 8)))


def test_a_redrawn_end_token_has_the_masked_distribution():
    """What `step` does below the minimum: the second draw, where the first was an end token."""
    sampling = SAMPLINGS[-1]
    first, second = draws(sampling)
    redrawn = second[np.isin(first, ENDS)]
    expected = distribution(sampling, masked=True) * len(redrawn)
    support = expected > 0
    assert len(redrawn) > COUNT / 4
    assert stats.chisquare(np.bincount(redrawn, minlength=VOCAB)[support], expected[support]).pvalue > 1e-3


def test_the_two_draws_are_independent():
    first, second = draws(Sampling(temperature=1.0, top_k=5))
    table = stats.contingency.crosstab(first, second).count
    assert table.shape == (5, 5)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_padding_ids_never_appear_in_a_million_draws():
    for seed in range(1_000_000 // (2 * COUNT)):
        both = draws(Sampling(temperature=1e6), seed)
        assert VALID[both].all()
        assert not np.isin(both[1], ENDS).any()
        assert len(np.unique(both[0])) == VALID.sum()


@pytest.mark.parametrize("sampling", [Sampling(), *SAMPLINGS, Sampling(temperature=1e6, top_p=0.99)])
def test_extreme_logits_give_valid_ids(sampling):
    random = np.random.default_rng(0)
    for logits in (np.zeros(VOCAB), 1e30 * random.normal(size=VOCAB), np.where(VALID, -1e30, 1e30)):
        both = draws(sampling, logits=logits.astype(np.float32))
        assert VALID[both].all()
        assert not np.isin(both[1], ENDS).any()


def test_greedy_takes_the_most_probable_valid_id():
    first, second = draws(Sampling())
    assert set(first) == {ENDS[0]}
    best_other = max(set(range(20)) - set(ENDS), key=lambda i: LOGITS[i])
    assert set(second) == {best_other}
    assert first.dtype == second.dtype == np.int32


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, top_k=1), Sampling(temperature=1e-6)])
def test_narrow_sampling_is_greedy(sampling):
    np.testing.assert_array_equal(draws(sampling), draws(Sampling()))


def test_the_filters_find_other_ids_than_end_tokens():
    """Both of the two most probable ids are end tokens; masked, there are two others."""
    sampling = Sampling(temperature=1.0, top_k=2)
    first, second = draws(sampling)
    assert set(first) == set(ENDS)
    others = sorted(set(range(20)) - set(ENDS), key=lambda i: -LOGITS[i])
    assert set(second) == set(others[:2])


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLINGS[0], SAMPLINGS[-1]])
def test_a_profile_without_end_tokens_masks_nothing(sampling):
    first, second = draws(sampling, ends=NO_ENDS)
    assert VALID[first].all()
    if sampling.temperature == 0:
        np.testing.assert_array_equal(first, second)
    else:
        assert np.isin(second, ENDS).any()


@pytest.mark.parametrize("samplings", [[Sampling(temperature=1.0)], SAMPLINGS[-1:], [Sampling(), *SAMPLINGS]])
def test_a_row_does_not_depend_on_its_batch(samplings):
    """Nor on how its other rows are drawn."""
    own = [samplings[i % len(samplings)] for i in range(16)]
    logits = np.random.default_rng(1).normal(size=(len(own), VOCAB)).astype(np.float32)
    keys = jnp.stack([request_key(5, i // 2, i % 2) for i in range(len(own))])
    positions = jnp.arange(len(own)) % 3
    draws = functools.reduce(Draws.__or__, map(draws_of, own))
    params = sampling_params(own, len(own))
    whole = sample_compiled(logits, step_keys(keys, positions), draws, params, VALID, ENDS)
    for i, sampling in enumerate(own):
        key = step_keys(keys[i, None], positions[i, None])
        params = sampling_params([sampling], 1)
        alone = sample_compiled(logits[i, None], key, draws_of(sampling), params, VALID, ENDS)
        assert [int(ids[0]) for ids in alone] == [int(ids[i]) for ids in whole]


def test_keys_differ_by_seed_request_sample_and_position():
    keys = [request_key(s, r, n) for s in (0, 1) for r in (0, 1) for n in (0, 1)]
    stepped = [step_keys(key[None], jnp.array([p]))[0] for key in keys for p in (0, 1)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in stepped}) == 16


def test_keys_are_the_same_whatever_jax_draws_with():
    with jax.default_prng_impl("rbg"):
        key = request_key(0, 0, 0)
    assert jax.random.key_impl(key) == jax.random.key_impl(request_key(0, 0, 0))
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(request_key(0, 0, 0)))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_past_32_bits_are_refused(seed):
    with pytest.raises(ValueError, match="seed: expected 0 to 4294967295"):
        request_key(seed, 0, 0)


@given(
    size=st.sampled_from([1, 3, 15, 16, 17, 24, 300, 1000, 4096]),
    rows=st.integers(1, 5),
    steps=st.sampled_from([0.001, 1.0, 40.0]),
    offset=st.sampled_from([-1e4, -95.0, 0.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_a_survey_finds_the_first_of_the_greatest_and_the_total(size, rows, steps, offset, seed):
    rng = np.random.default_rng(seed)
    # Many that are equal.
    logits = (rng.integers(-9, 9, (rows, size)) * steps + offset).astype(np.float32)
    valid = rng.random(size) < 0.8
    valid[rng.integers(size)] = True
    ends = rng.integers(0, size, rng.integers(0, 3))
    found = survey_compiled(logits, valid, ends)
    allowed = np.stack([valid, valid & ~np.isin(np.arange(size), ends)])
    for i, set_ in enumerate(allowed):
        if set_.any():
            np.testing.assert_array_equal(found.greatest[:, i], np.where(set_, logits, -np.inf).argmax(-1))
    assert found.finite.all()
    exact = logits.astype(float)
    most = exact.max(-1, keepdims=True)
    total = most[:, 0] + np.log(np.exp(exact - most).sum(-1))
    np.testing.assert_allclose(found.log_total, total, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 22])
def test_a_survey_sees_a_score_that_is_not_finite(value, place):
    logits = np.random.default_rng(0).normal(size=(3, 23)).astype(np.float32)
    logits[1, place] = value
    assert survey_compiled(logits, np.ones(23, bool), NO_ENDS).finite.tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logprobs_are_the_models_own(dtype):
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(6, VOCAB)), dtype)
    ids = jnp.array([0, 5, 11, 19, 20, 23])
    exact = np.asarray(logits, np.float64)
    expected = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    found = token_logprobs(logits, survey(logits, VALID, ENDS).log_total, ids)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected[np.arange(6), ids], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"temperature": -0.1, "top_k": 0}, ["temperature", "top_k"]),
        ({"temperature": float("inf")}, ["temperature"]),
        ({"temperature": float("nan")}, ["temperature"]),
        ({"temperature": 1e-9}, ["temperature"]),
        ({"top_p": 0.0, "min_p": -0.1}, ["top_p", "min_p"]),
        ({"top_p": 1.1, "min_p": 1.1, "top_k": -1}, ["top_p", "min_p", "top_k"]),
    ],
)
def test_unfit_settings_are_refused_together(settings, keys):
    with pytest.raises(ValueError, match="expected") as error:
        Sampling(**settings)
    for key in keys:
        assert f"{key}: expected" in str(error.value)


def test_top_k_is_a_whole_number():
    # A TypeError where signatures are checked as well.
    with pytest.raises((ValueError, TypeError), match="top_k"):
        Sampling(top_k=2.5)
