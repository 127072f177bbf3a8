"""Requests that share a row, against each alone; and where they part, against the plain rules."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.decoding.budget import RowParams, ThinkingBudget, build_tables, start_rows
from s1jax.decoding.engine import Engine
from s1jax.decoding.forks import Rules, WaitTexts, fork
from s1jax.decoding.profiles import prepare_prompt
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished, Generation
from s1jax.decoding.sampling import Sampling
from s1jax.model.load import LoadedModel
from tests.decoding.automaton import CONTEXT_LENGTH, IDS
from tests.decoding.test_budget_properties import PROMPTS
from tests.decoding.test_generate import profile_ids
from tests.decoding.test_profiles import TOKENIZER, encode
from tests.reference import budget as reference

WAITS = ("Wait", "", ("Wait", " Hmm"), "Wait\n")
thinking = st.fixed_dictionaries(
    {
        "max_thinking_tokens": st.none() | st.integers(0, 14),
        "min_thinking_tokens": st.sampled_from([0, 0, 3, 8]),
        "num_ignore": st.integers(0, 4),
        "wait": st.sampled_from(WAITS),
    }
)


@settings(max_examples=800, deadline=None)
@given(
    profile=st.sampled_from(sorted(set(IDS) - {"none"})),
    prompt=st.integers(0, 3),
    both=st.tuples(thinking, thinking),
    answer=st.none() | st.integers(0, 6),
    total=st.none() | st.integers(12, CONTEXT_LENGTH),
    end_share=st.sampled_from([0.0, 0.1, 0.3, 0.7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_runs_have_the_same_tokens_up_to_the_fork_and_are_the_same_without_one(
    profile: str,
    prompt: int,
    both: tuple[dict, dict],
    answer: int | None,
    total: int | None,
    end_share: float,
    seed: int,
) -> None:
    ids, rng = IDS[profile], np.random.default_rng(seed)
    ends = np.array(ids.end_tokens)
    others = np.setdiff1d(np.flatnonzero(ids.valid), ends)
    draws = rng.choice(others, (2, CONTEXT_LENGTH + 1))
    drawn_ends = rng.random(CONTEXT_LENGTH + 1) < end_share
    draws[0, drawn_ends] = rng.choice(ends, drawn_ends.sum())
    budgets = [ThinkingBudget(**own, max_answer_tokens=answer, max_total_tokens=total) for own in both]
    prepared = prepare_prompt(encode(PROMPTS[profile][prompt]), ids)
    before = prepared.num_thinking_tokens
    steps: list[int] = []

    def next_token(context: list[int], masked: bool) -> int:
        token = int(draws[int(masked), len(context)])
        if not masked and token in ids.end_tokens:
            steps.append(len(context) - len(prepared.prompt_ids))
        return token

    run = partial(reference.run_budget, next_token, encode(PROMPTS[profile][prompt]), ids)
    try:
        results = []
        for budget in budgets:
            steps.clear()
            results.append(run(budget, encode, CONTEXT_LENGTH))
            if len(results) == 1:
                attempts = [step for step in steps if step <= results[0].num_thinking_tokens - before]
    except ValueError:
        return  # There is no room to answer.
    tables, wait_starts = build_tables(ids, budgets, TOKENIZER)
    texts = WaitTexts(np.asarray(tables.text_ids), np.asarray(tables.text_lengths))
    params, _ = start_rows(budgets, [prepared] * 2, ids, wait_starts, CONTEXT_LENGTH, 2)
    rules = [Rules(RowParams(*(int(values[row]) for values in params)), texts) for row in range(2)]
    at = fork(*rules, attempts, len(results[0].output_ids), before)
    tokens = [list(zip(result.output_ids, result.forced, strict=True)) for result in results]
    if at is None:
        assert tokens[0] == tokens[1]
        assert replace(results[0], thinking_end=None) == replace(results[1], thinking_end=None)
        return
    assert at.step <= len(tokens[0])
    assert tokens[0][: at.step] == tokens[1][: at.step]
    assert results[0] != results[1]


def families(loaded: LoadedModel, name: str, seed: int) -> list[Request]:
    """Of 12 prompts several budgets each, of which some answer in another way."""
    rng, ids = np.random.default_rng(seed), profile_ids(loaded, name)
    requests = []
    for index in range(12):
        prompt = prepare_prompt(rng.integers(0, 362, rng.integers(1, 24)).tolist(), ids)
        for _ in range(rng.integers(1, 9)):
            budget = ThinkingBudget(
                max_thinking_tokens=[None, "auto", 0, *rng.integers(1, 40, 4).tolist()][rng.integers(7)],
                min_thinking_tokens=int(rng.choice([0, 0, 0, 6])),
                num_ignore=int(rng.integers(0, 4)),
                wait=["Wait", "Wait", "", ("Wait", "So ")][rng.integers(4)],
                max_answer_tokens=int(rng.choice([6, 6, 6, 2])),
                max_total_tokens=140,
            )
            requests.append(Request(prompt, budget, index, sample=int(rng.integers(0, 2))))
    return requests


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s1", "qwen3", "none"])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_shared_or_alone_results_are_the_same(loaded: LoadedModel, name: str, temperature: float) -> None:
    sampling, ids = Sampling(temperature=temperature), profile_ids(loaded, name)
    requests = [replace(r, sampling=sampling, seed=3) for r in families(loaded, name, seed=len(name))]

    def run(share: bool, batch_size: int) -> tuple[list[Generation], int]:
        engine = Engine(loaded, loaded.tokenizer, ids, batch_size=batch_size, logprobs=True, share=share)
        finished = [event for event in engine.run(requests) if isinstance(event, Finished)]
        results = {id(event.request): event.generation for event in finished}
        assert len(finished) == len(results) == len(requests)
        return [results[id(r)] for r in requests], sum(event.num_decoded_tokens for event in finished)

    for batch_size in (8, 16):
        alone, every_token = run(False, batch_size)
        shared, decoded = run(True, batch_size)
        for one, other in zip(shared, alone, strict=True):
            assert replace(one, logprobs=None) == replace(other, logprobs=None)
            # How many slots the cache has depends on the rows at work, and the order in which XLA adds on that.
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert every_token == sum(len(result.output_ids) for result in alone)
        assert decoded < 0.9 * every_token
