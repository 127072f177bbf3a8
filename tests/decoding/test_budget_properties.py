"""The automaton on random batches: equal to the plain rules, and what must hold of any row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.decoding.budget import (
    Phase,
    ThinkingBudget,
    build_tables,
    resolve_max_thinking_tokens,
    start_rows,
    step,
)
from s1jax.decoding.profiles import (
    ProfileIds,
    prepare_prompt,
)
from s1jax.decoding.sampling import Sampling, draws_of, request_key, sample, sampling_params, step_keys, survey
from tests.decoding.automaton import BATCH, CONTEXT_LENGTH, IDS, POSITIONS, TEXTS, Row, by_reference, results
from tests.decoding.test_profiles import TOKENIZER, VOCAB_SIZE, encode
from tests.reference import budget as reference

WAITS = ("Wait", "", ("Wait", " Hmm"), "Wait\n", (" Hmm", "", "Wait\n\n a"))
PROMPTS = {
    "s1": ["hi", "hi<|im_start|>think\n a", "<|im_start|>think a<|im_end|>\nhi<|im_start|>think", "user\nhi"],
    "qwen3": ["hi", "hi<think>\n a b\n", "<think> a</think>\n hi", "hi<think>"],
    "deepseek-r1": ["hi", "hi<think>\n a b\n", "hi<think>\n\n a", "user\nhi"],
    "long-end": ["hi", "hi<think> a", "user\nhi", "<think> a<|im_start|>"],
    "none": ["hi", "hi<|im_start|>think\n a", "hi<think>\n", "user\nhi"],
}

settings_of_a_row = st.fixed_dictionaries(
    {
        "max_thinking_tokens": st.none() | st.integers(0, 14),
        "min_thinking_tokens": st.integers(0, 12),
        "num_ignore": st.integers(0, 4),
        "wait": st.sampled_from(WAITS),
        "max_answer_tokens": st.none() | st.integers(0, 6),
        "max_total_tokens": st.none() | st.integers(8, CONTEXT_LENGTH + 5),
    }
)


@st.composite
def batches(draw) -> tuple[str, list[Row]]:
    """One to four rows of one profile, each with its own prompt, settings and model."""
    profile = draw(st.sampled_from(sorted(IDS)))
    ids = IDS[profile]
    rows = []
    for _ in range(draw(st.integers(1, BATCH))):
        budget = draw(settings_of_a_row)
        if budget["max_answer_tokens"] is not None and draw(st.integers(0, 4)) == 0:
            budget["max_thinking_tokens"] = "auto"
        # The model draws from all ids, end tokens as often as the case says.
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        end_share = draw(st.sampled_from([0.0, 0.1, 0.3, 0.7]))
        ends = np.array(ids.end_tokens or ids.eos)
        others = np.setdiff1d(np.flatnonzero(ids.valid), ends)
        draws = rng.choice(others, (2, POSITIONS)).astype(np.int32)
        attempts = rng.random(POSITIONS) < end_share
        draws[0, attempts] = rng.choice(ends, attempts.sum())
        prompt = encode(draw(st.sampled_from(PROMPTS[profile])))
        rows.append(Row(prompt, ThinkingBudget(**budget), draws))
    return profile, rows


@settings(max_examples=600, deadline=None)
@given(batches())
def test_mixed_batches_follow_the_reference(batch):
    profile, rows = batch
    ids = IDS[profile]
    fitting, expected = [], []
    for row in rows:
        try:
            expected.append(by_reference(row, ids))
            fitting.append(row)
        except ValueError:
            with pytest.raises(ValueError, match="no room to answer"):
                resolve_max_thinking_tokens(row.budget, row.prepared(ids), ids, CONTEXT_LENGTH)
    found = results(fitting, ids)
    assert found == expected
    for row, result in zip(fitting, found, strict=True):
        assert_invariants(row, ids, result)
    # Whatever a row's company and its place in the batch.
    for row, result in zip(fitting[1:], found[1:], strict=True):
        assert results([row], ids) == [result]


def assert_invariants(row: Row, ids: ProfileIds, result: reference.Result) -> None:
    budget, prompt = row.budget, row.prepared(ids)
    thinking = result.num_thinking_tokens - prompt.num_thinking_tokens
    if isinstance(budget.max_thinking_tokens, int):
        assert result.num_thinking_tokens <= max(budget.max_thinking_tokens, prompt.num_thinking_tokens)
    if result.thinking_end in ("budget", "context"):
        region = (
            *prompt.prompt_ids[len(prompt.prompt_ids) - prompt.num_thinking_tokens :],
            *result.output_ids,
        )
        region = region[: result.num_thinking_tokens]
        newline = bool(region) and TEXTS[region[-1]].endswith("\n")
        ending = tuple(ids.budget_end if newline else ids.budget_end_with_newline)
        assert tuple(result.output_ids[thinking : thinking + len(ending)]) == ending
        assert all(result.forced[thinking : thinking + len(ending)])
        # The room for the answer was kept.
        assert result.finish_reason != "context" or budget.max_answer_tokens is None
    sampled_thinking = [t for t, f in zip(result.output_ids[:thinking], result.forced, strict=False) if not f]
    assert not set(result.output_ids[:thinking]) & set(ids.end_tokens)
    assert len(result.output_ids) == len(sampled_thinking) + result.num_forced_tokens + result.num_answer_tokens
    assert result.num_waits <= budget.num_ignore
    assert len(prompt.prompt_ids) + len(result.output_ids) <= (budget.max_total_tokens or CONTEXT_LENGTH)
    if result.thinking_end in ("natural", "eos") and budget.max_thinking_tokens is None:
        assert result.num_thinking_tokens >= budget.min_thinking_tokens


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_k=12, top_p=0.9)])
def test_a_sampling_model_follows_the_reference_in_any_batch(sampling):
    """Its next token depends on the last one; its keys on the position, so the reference draws the same."""
    ids = IDS["s1"]
    table = 2 * np.random.default_rng(0).normal(size=(VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32)
    table[:, ~ids.valid] = 50  # the model would like the padding rows best
    table[:, ids.end_tokens] += 1
    end_tokens = np.array(ids.end_tokens)
    budgets = [
        ThinkingBudget(max_thinking_tokens=12, num_ignore=2, max_answer_tokens=5),
        ThinkingBudget(min_thinking_tokens=9, max_answer_tokens=6),
        ThinkingBudget(max_thinking_tokens="auto", num_ignore=5, wait=("Wait", ""), max_answer_tokens=3),
        ThinkingBudget(max_thinking_tokens=3),
    ]
    prompts = [encode(text) for text in ("hi", "hi a", "hi<|im_start|>think\n", " b")]
    tables, wait_starts = build_tables(ids, budgets, TOKENIZER)
    prepared = [prepare_prompt(prompt, ids) for prompt in prompts]

    def draw(last_tokens, keys, positions):
        params = sampling_params([sampling] * len(last_tokens), len(last_tokens))
        logits, own_keys = jnp.asarray(table)[last_tokens], step_keys(keys, positions)
        greatest = survey(logits, ids.valid, end_tokens).greatest
        return sample(logits, greatest, own_keys, draws_of(sampling), params, ids.valid, end_tokens)

    @jax.jit
    def generate(params, state, keys, last_tokens):
        def body(carry):
            state, last, output_ids = carry
            position = state.length
            drawn = draw(last, keys, position)
            state, token, _, written = step(state, params, tables, *drawn)
            position = jnp.where(written, position, CONTEXT_LENGTH)
            output_ids = output_ids.at[jnp.arange(BATCH), position].set(token, mode="drop")
            return state, jnp.where(written, token, last), output_ids

        carry = (state, last_tokens, jnp.full((BATCH, CONTEXT_LENGTH), -1))
        return jax.lax.while_loop(lambda carry: (carry[0].phase != Phase.DONE).any(), body, carry)

    draw_one = jax.jit(draw)

    def outputs(indices):
        params, state = start_rows(
            [budgets[i] for i in indices],
            [prepared[i] for i in indices],
            ids,
            wait_starts,
            CONTEXT_LENGTH,
            BATCH,
        )
        padded = list(indices) + [0] * (BATCH - len(indices))
        keys = jnp.stack([request_key(7, i, 0) for i in padded])
        last = jnp.array([prepared[i].prompt_ids[-1] for i in padded])
        output_ids = np.asarray(generate(params, state, keys, last)[2])
        return [[t for t in output_ids[i].tolist() if t >= 0] for i in range(len(indices))]

    expected = []
    for i, (budget, prompt) in enumerate(zip(budgets, prompts, strict=True)):
        key = request_key(7, i, 0)[None]

        def next_token(context, masked, key=key):
            return int(draw_one(jnp.array(context[-1:]), key, jnp.array([len(context)]))[int(masked)][0])

        result = reference.run_budget(next_token, prompt, ids, budget, encode, CONTEXT_LENGTH)
        assert ids.valid[result.output_ids].all()
        expected.append(result.output_ids)
    assert outputs([0, 1, 2, 3]) == expected
    assert outputs([3, 1]) == [expected[3], expected[1]]
    assert outputs([2]) == [expected[2]]
