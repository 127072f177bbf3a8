from dataclasses import dataclass
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.decoding.budget import (
    FinishReason,
    Phase,
    RowParams,
    RowState,
    Tables,
    ThinkingBudget,
    ThinkingEnd,
    build_tables,
    resolve_max_thinking_tokens,
    start_rows,
    step,
)
from s1jax.decoding.profiles import (
    DelimiterProfile,
    PreparedPrompt,
    ProfileIds,
    prepare_prompt,
    tokenize_profile,
)
from s1jax.decoding.sampling import Sampling, request_key, sample, step_keys
from tests.decoding.test_profiles import IDS as BUILT_IN
from tests.decoding.test_profiles import TOKENIZER, VOCAB_SIZE, encode
from tests.reference import budget as reference

BATCH = 4
CONTEXT_LENGTH = 48
POSITIONS = 50
# The room kept for its budget end is too small for its natural end.
LONG_END = DelimiterProfile(
    "long-end",
    eos=("<|im_end|>",),
    start="<think>",
    end_tokens=("</think>", "<|im_start|>"),
    end="\n\n</think>\n\n a b c",
    budget_end="</think>",
)
IDS = {**BUILT_IN, LONG_END.name: tokenize_profile(LONG_END, TOKENIZER, VOCAB_SIZE)}
TEXTS = [TOKENIZER.decode([i]) for i in range(VOCAB_SIZE)]


@dataclass(frozen=True)
class Row:
    """A prompt, its settings, and the model: what it draws at each position of the context, [2, POSITIONS].

    The second line is what it draws with the end tokens masked.
    """

    prompt: list[int]
    budget: ThinkingBudget
    draws: np.ndarray

    def prepared(self, ids: ProfileIds) -> PreparedPrompt:
        return prepare_prompt(self.prompt, ids)


def by_reference(row: Row, ids: ProfileIds) -> reference.Result:
    budget = row.budget
    return reference.run(
        lambda context, masked: int(row.draws[int(masked), len(context)]),
        row.prompt,
        ids,
        max_thinking_tokens=budget.max_thinking_tokens,
        min_thinking_tokens=budget.min_thinking_tokens,
        num_ignore=budget.num_ignore,
        waits=[encode(text) for text in budget.waits],
        max_answer_tokens=budget.max_answer_tokens,
        max_total_tokens=min(CONTEXT_LENGTH, budget.max_total_tokens or CONTEXT_LENGTH),
    )


def start(rows: list[Row], ids: ProfileIds) -> tuple[RowParams, RowState, Tables, np.ndarray]:
    """Everything padded to one shape, so that nothing compiles twice."""
    budgets = [row.budget for row in rows]
    tables, wait_starts = build_tables(ids, budgets, TOKENIZER)
    texts, length = tables.text_ids.shape
    tables = tables._replace(
        text_ids=jnp.pad(tables.text_ids, ((0, 24 - texts), (0, 8 - length))),
        text_lengths=jnp.pad(tables.text_lengths, (0, 24 - texts)),
    )
    prompts = [row.prepared(ids) for row in rows]
    params, state = start_rows(budgets, prompts, ids, wait_starts, CONTEXT_LENGTH, BATCH)
    draws = np.zeros((BATCH, 2, POSITIONS), np.int32)
    for i, row in enumerate(rows):
        draws[i] = row.draws
    return params, state, tables, draws


def decode_step(params, tables, draws, carry):
    state, output_ids, forced_flags = carry
    row = jnp.arange(BATCH)
    position = state.length
    sampled, masked = draws[row, 0, position], draws[row, 1, position]
    state, token, forced, written = step(state, params, tables, sampled, masked)
    position = jnp.where(written, position, POSITIONS)
    output_ids = output_ids.at[row, position].set(token, mode="drop")
    forced_flags = forced_flags.at[row, position].set(forced, mode="drop")
    return state, output_ids, forced_flags


def nothing_written():
    return jnp.full((BATCH, POSITIONS), -1), jnp.zeros((BATCH, POSITIONS), bool)


@jax.jit
def compiled_loop(params, state, tables, draws):
    def goes_on(carry):
        return (carry[0] < POSITIONS) & (carry[1][0].phase != Phase.DONE).any()

    def body(carry):
        return carry[0] + 1, decode_step(params, tables, draws, carry[1])

    return jax.lax.while_loop(goes_on, body, (0, (state, *nothing_written())))[1]


@jax.jit
def compiled_step(params, state, tables, draws, output_ids, forced_flags):
    return decode_step(params, tables, draws, (state, output_ids, forced_flags))


def step_by_step(params, state, tables, draws):
    output_ids, forced_flags = nothing_written()
    for _ in range(POSITIONS):
        before, done = state, np.asarray(state.phase) == Phase.DONE
        state, output_ids, forced_flags = compiled_step(params, before, tables, draws, output_ids, forced_flags)
        for old, new in zip(before, state, strict=True):
            np.testing.assert_array_equal(np.asarray(old)[done], np.asarray(new)[done])
    return state, output_ids, forced_flags


def results(rows: list[Row], ids: ProfileIds, loop=compiled_loop) -> list[reference.Result]:
    params, state, tables, draws = start(rows, ids)
    state, output_ids, forced = jax.tree.map(np.asarray, loop(params, state, tables, draws))
    assert (state.phase == Phase.DONE).all()
    assert (output_ids[len(rows) :] == -1).all()
    found = []
    for i, row in enumerate(rows):
        prompt_ids = list(row.prepared(ids).prompt_ids)
        written = slice(len(prompt_ids), int(state.length[i]))
        assert (np.delete(output_ids[i], np.r_[written]) == -1).all()
        found.append(
            reference.Result(
                prompt_ids=prompt_ids,
                output_ids=output_ids[i, written].tolist(),
                forced=forced[i, written].tolist(),
                num_thinking_tokens=int(state.num_thinking_tokens[i]),
                num_answer_tokens=int(state.num_answer_tokens[i]),
                num_forced_tokens=int(forced[i, written].sum()),
                num_waits=int(state.num_waits[i]),
                thinking_end=ThinkingEnd(state.thinking_end[i]).reported,
                finish_reason=FinishReason(state.finish_reason[i]).reported,
            )
        )
    return found


def marked(result: reference.Result) -> str:
    """The output's text, with what was forced in brackets."""
    text = ""
    for forced, tokens in groupby(zip(result.output_ids, result.forced, strict=True), lambda pair: pair[1]):
        part = "".join(TEXTS[token] for token, _ in tokens)
        text += f"[{part}]" if forced else part
    return text


def scripted(text: str, prompt: str = "hi", profile: str = "s1", **settings) -> Row:
    """A row whose model draws the tokens of `text` one after the other, then its eos.

    A forced token takes the place of a drawn one. With the end tokens masked, " d" comes instead of them.
    """
    ids = IDS[profile]
    prompt_ids = encode(prompt)
    first = len(prepare_prompt(prompt_ids, ids).prompt_ids)
    tokens = encode(text)
    draws = np.full(POSITIONS, ids.eos[0], np.int32)
    draws[first : first + len(tokens)] = tokens
    masked = np.where(np.isin(draws, ids.end_tokens), TEXTS.index(" d"), draws)
    return Row(prompt_ids, ThinkingBudget(**settings), np.stack([draws, masked]))


MODEL = "\n a b\n<|im_start|> c d\n<|im_start|>"

# The model's tokens and the row's settings; the output, thinking_end, thinking tokens and waits.
WORKED_EXAMPLES = [
    (MODEL, {"max_thinking_tokens": 10}, "\n a b\n[<|im_start|>answer]", "natural", 4, 0),
    (MODEL, {"max_thinking_tokens": 4}, "\n a b\n[<|im_start|>answer\nFinal Answer:]", "budget", 4, 0),
    (MODEL, {"max_thinking_tokens": 3}, "\n a b[\n<|im_start|>answer\nFinal Answer:]", "budget", 3, 0),
    (
        MODEL,
        {"max_thinking_tokens": 20, "num_ignore": 1},
        "\n a b\n[Wait] c d\n[<|im_start|>answer]",
        "natural",
        8,
        1,
    ),
    (MODEL, {"max_thinking_tokens": 5, "num_ignore": 1}, "\n a b\n[<|im_start|>answer]", "natural", 4, 0),
    (
        MODEL,
        {"max_thinking_tokens": 6, "num_ignore": 1},
        "\n a b\n[Wait] c[\n<|im_start|>answer\nFinal Answer:]",
        "budget",
        6,
        1,
    ),
    (" a b<|im_end|>", {}, " a b[<|im_start|>answer]", "eos", 2, 0),
]

END = "<|im_start|>"
ANSWER = "[<|im_start|>answer]"
FINAL_ANSWER = "[\n<|im_start|>answer\nFinal Answer:]"
MORE_EXAMPLES = [
    # Rule 2: with a budget of 0 nothing is sampled, and there is no last token to end in a newline.
    (MODEL, {"max_thinking_tokens": 0}, FINAL_ANSWER, "budget", 0, 0),
    (" a.\n b", {"max_thinking_tokens": 2}, " a.\n[<|im_start|>answer\nFinal Answer:]", "budget", 2, 0),
    # Rule 3a: every token of a wait counts, and the one after it is masked.
    (
        f" a{END}{END}{END} b",
        {"max_thinking_tokens": 5, "num_ignore": 9, "wait": "Wait\n"},
        f" a[Wait\n] d b{FINAL_ANSWER}",
        "budget",
        5,
        1,
    ),
    (
        f" a{END * 7}",
        {"num_ignore": 3, "wait": ("Wait", " Hmm")},
        f" a[Wait] d[ Hmm] d[Wait] d{ANSWER}",
        "natural",
        7,
        3,
    ),
    (f" a{END * 3}", {"num_ignore": 2, "wait": ""}, f" a d d{ANSWER}", "natural", 3, 2),
    (f" a{END * 4}", {"num_ignore": 2, "wait": ("", "Wait")}, f" a d[Wait] d{ANSWER}", "natural", 4, 2),
    (" a<|im_end|> b<|endoftext|>", {"num_ignore": 1}, f" a[Wait] b{ANSWER}", "eos", 3, 1),
    # Rule 3b: drawn again until there are m; but B wins, and a wait that does not fit leaves m in force.
    (END * 4, {"min_thinking_tokens": 3}, f" d d d{ANSWER}", "natural", 3, 0),
    (END * 9, {"min_thinking_tokens": 5, "max_thinking_tokens": 2}, f" d d{FINAL_ANSWER}", "budget", 2, 0),
    (
        f" a{END * 2}",
        {"min_thinking_tokens": 2, "max_thinking_tokens": 2, "num_ignore": 1},
        f" a d{FINAL_ANSWER}",
        "budget",
        2,
        0,
    ),
    (END * 4, {"min_thinking_tokens": 3, "num_ignore": 1}, f"[Wait] d d{ANSWER}", "natural", 3, 1),
]


def by_automaton(row: Row, ids: ProfileIds) -> reference.Result:
    [compiled], [stepped] = results([row], ids), results([row], ids, step_by_step)
    assert compiled == stepped
    return compiled


@pytest.mark.parametrize("run", [by_reference, by_automaton])
@pytest.mark.parametrize(("model", "settings", "output", "thinking_end", "count", "waits"), WORKED_EXAMPLES)
def test_worked_examples(run, model, settings, output, thinking_end, count, waits):
    result = run(scripted(model, max_answer_tokens=0, **settings), IDS["s1"])
    assert (marked(result), result.thinking_end) == (output, thinking_end)
    assert (result.num_thinking_tokens, result.num_waits) == (count, waits)


@pytest.mark.parametrize("run", [by_reference, by_automaton])
@pytest.mark.parametrize(("model", "settings", "output", "thinking_end", "count", "waits"), MORE_EXAMPLES)
def test_suppressed_attempts_and_spent_budgets(run, model, settings, output, thinking_end, count, waits):
    result = run(scripted(model, max_answer_tokens=0, **settings), IDS["s1"])
    assert (marked(result), result.thinking_end) == (output, thinking_end)
    assert (result.num_thinking_tokens, result.num_waits) == (count, waits)


ANSWERS = f" a{END * 2} b{END} c"
LONG_ANSWER = f" a{END * 2} b b b b b b"
AT_ONCE = f"{END * 5} b{END} c"


@pytest.mark.parametrize("run", [by_reference, by_automaton])
@pytest.mark.parametrize(
    ("model", "settings", "output", "count", "finish_reason"),
    [
        # Only an eos ends the answer, an end token of the thinking does not.
        (ANSWERS, {}, f" a{ANSWER} b{END} c", 3, "stop"),
        (ANSWERS, {"max_answer_tokens": 4}, f" a{ANSWER} b{END} c", 3, "stop"),
        (ANSWERS, {"max_answer_tokens": 3}, f" a{ANSWER} b{END} c", 3, "length"),
        (ANSWERS, {"max_answer_tokens": 2}, f" a{ANSWER} b{END}", 2, "length"),
        (ANSWERS, {"max_answer_tokens": 0}, f" a{ANSWER}", 0, "length"),
        # The prompt has 3 tokens with its start.
        (LONG_ANSWER, {"max_total_tokens": 11}, f" a{ANSWER} b b b b b", 5, "context"),
        # Room is kept for the budget end, 5 tokens with its newline, and for the answer.
        (AT_ONCE, {"max_total_tokens": 9}, f"{FINAL_ANSWER} b", 1, "context"),
        (AT_ONCE, {"max_total_tokens": 9, "max_answer_tokens": 1}, f"{FINAL_ANSWER} b", 1, "length"),
        (AT_ONCE, {"max_total_tokens": 10, "max_answer_tokens": 2}, f"{FINAL_ANSWER} b{END}", 2, "length"),
        (AT_ONCE, {"max_total_tokens": 8, "max_answer_tokens": 0}, FINAL_ANSWER, 0, "length"),
    ],
)
def test_what_ends_an_answer(run, model, settings, output, count, finish_reason):
    result = run(scripted(model, **settings), IDS["s1"])
    assert marked(result) == output
    assert (result.num_answer_tokens, result.finish_reason) == (count, finish_reason)


SENTENCE = next(text for text in TEXTS if text.startswith("Considering"))


@pytest.mark.parametrize("run", [by_reference, by_automaton])
@pytest.mark.parametrize(
    ("profile", "prompt", "model", "budget", "output", "thinking_end", "count"),
    [
        ("qwen3", "hi", " a</think>\n\n b", None, " a[</think>]\n\n b", "natural", 1),
        ("qwen3", "hi", " a<|im_end|> b", None, " a[</think>] b", "eos", 1),
        ("qwen3", "hi", " a\n b", 2, f" a\n[{SENTENCE}\n</think>\n\n]", "budget", 2),
        ("deepseek-r1", "hi", " a\n b", 2, " a\n[</think>\n\n]", "budget", 2),
        ("deepseek-r1", "hi", " a b", 1, " a[\n</think>\n\n]", "budget", 1),
        ("deepseek-r1", "hi", " a<|im_end|> b", 3, " a<|im_end|> b[\n</think>\n\n]", "budget", 3),
        # Thinking tokens in the prompt count; there may be more of them than the budget allows.
        ("qwen3", "hi<think>\n a b", " c</think>", None, " c[</think>]", "natural", 3),
        ("deepseek-r1", "hi<think>\n a b", " c d", 3, " c[\n</think>\n\n]", "budget", 3),
        ("deepseek-r1", "hi<think>\n a b\n", " c d", 3, "[</think>\n\n]", "budget", 3),
        ("deepseek-r1", "hi<think>\n a b c d", " c d", 3, "[\n</think>\n\n]", "budget", 4),
        # No thinking at all.
        ("none", "hi", " a</think> b", 5, " a</think> b", None, 0),
    ],
)
def test_profiles(run, profile, prompt, model, budget, output, thinking_end, count):
    result = run(scripted(model, prompt=prompt, profile=profile, max_thinking_tokens=budget), IDS[profile])
    assert (marked(result), result.thinking_end) == (output, thinking_end)
    assert result.num_thinking_tokens == count
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("run", [by_reference, by_automaton])
def test_the_total_limit_cuts_an_end_that_is_longer_than_the_room_kept(run):
    result = run(scripted(" a b</think>", profile="long-end", max_total_tokens=7), IDS["long-end"])
    assert marked(result) == " a b[\n\n</think>\n\n]"
    assert (result.thinking_end, result.finish_reason) == ("natural", "context")


def test_a_row_of_a_profile_without_thinking_may_have_nothing_to_do():
    [result] = results([scripted(" a", profile="none", max_answer_tokens=0)], IDS["none"])
    assert (result.output_ids, result.finish_reason) == ([], "length")


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
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        end_share = draw(st.sampled_from([0.0, 0.1, 0.3, 0.7]))
        ends = np.array(ids.end_tokens or ids.eos)
        others = np.setdiff1d(np.flatnonzero(ids.valid), ends)
        draws = random.choice(others, (2, POSITIONS)).astype(np.int32)
        attempts = random.random(POSITIONS) < end_share
        draws[0, attempts] = random.choice(ends, attempts.sum())
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
        return sample(jnp.asarray(table)[last_tokens], step_keys(keys, positions), sampling, ids.valid, end_tokens)

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

        result = reference.run(
            next_token,
            prompt,
            ids,
            max_thinking_tokens=budget.max_thinking_tokens,
            min_thinking_tokens=budget.min_thinking_tokens,
            num_ignore=budget.num_ignore,
            waits=[encode(text) for text in budget.waits],
            max_answer_tokens=budget.max_answer_tokens,
            max_total_tokens=CONTEXT_LENGTH,
        )
        assert ids.valid[result.output_ids].all()
        expected.append(result.output_ids)
    assert outputs([0, 1, 2, 3]) == expected
    assert outputs([3, 1]) == [expected[3], expected[1]]
    assert outputs([2]) == [expected[2]]


AUTO = {"max_thinking_tokens": "auto"}


@pytest.mark.parametrize(
    ("settings", "prompt", "expected"),
    [
        # 48 in all; the prompt has 3 tokens with its start, the budget end 5.
        ({**AUTO, "max_answer_tokens": 10}, "hi", (30, ThinkingEnd.BUDGET)),
        ({"max_thinking_tokens": None, "max_answer_tokens": 10}, "hi", (30, ThinkingEnd.CONTEXT)),
        ({"max_thinking_tokens": 30, "max_answer_tokens": 10}, "hi", (30, ThinkingEnd.BUDGET)),
        ({"max_thinking_tokens": 31, "max_answer_tokens": 10}, "hi", (30, ThinkingEnd.CONTEXT)),
        ({"max_thinking_tokens": None}, "hi", (39, ThinkingEnd.CONTEXT)),
        ({"max_thinking_tokens": 5}, "hi", (5, ThinkingEnd.BUDGET)),
        ({**AUTO, "max_answer_tokens": 10, "max_total_tokens": 20}, "hi", (2, ThinkingEnd.BUDGET)),
        ({**AUTO, "max_answer_tokens": 0, "max_total_tokens": 60}, "hi", (40, ThinkingEnd.BUDGET)),
        # What the prompt holds of the thinking takes no room from the rest.
        ({**AUTO, "max_answer_tokens": 10}, "hi<|im_start|>think\n a", (30, ThinkingEnd.BUDGET)),
    ],
)  # fmt: skip
def test_room_for_the_end_and_the_answer_is_kept_back(settings, prompt, expected):
    prepared = prepare_prompt(encode(prompt), IDS["s1"])
    found = resolve_max_thinking_tokens(ThinkingBudget(**settings), prepared, IDS["s1"], CONTEXT_LENGTH)
    assert found == expected


def test_rows_without_room_for_an_answer_are_refused_together():
    prompts = [prepare_prompt(encode(text), IDS["s1"]) for text in ("hi", "hi" * 30, "hi")]
    budgets = [
        ThinkingBudget(max_answer_tokens=5),
        ThinkingBudget(max_answer_tokens=12),
        ThinkingBudget(max_total_tokens=8),
    ]
    _, wait_starts = build_tables(IDS["s1"], budgets, TOKENIZER)
    with pytest.raises(ValueError, match="no room to answer") as error:
        start_rows(budgets, prompts, IDS["s1"], wait_starts, CONTEXT_LENGTH, BATCH)
    assert str(error.value).splitlines() == [
        "row 1: no room to answer: the prompt has 32 tokens, the end of thinking 5 and the answer 12, but "
        "context_length=48 and max_total_tokens=None allow 48 in all",
        "row 2: no room to answer: the prompt has 3 tokens, the end of thinking 5 and the answer 1, but "
        "context_length=48 and max_total_tokens=8 allow 8 in all",
    ]


def test_large_settings_do_not_overflow():
    row = scripted(
        f" a{END}{END}",
        max_thinking_tokens=2**40,
        min_thinking_tokens=1,
        num_ignore=2**40,
        max_answer_tokens=3,
    )
    assert results([row], IDS["s1"]) == [by_reference(row, IDS["s1"])]


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        ({"max_thinking_tokens": -1}, ["max_thinking_tokens: expected a whole number of at least 0 or None"]),
        ({"max_thinking_tokens": "auto"}, ["auto needs max_answer_tokens"]),
        ({"min_thinking_tokens": -1, "num_ignore": -2}, ["min_thinking_tokens: ", "found -1", "found -2"]),
        ({"max_answer_tokens": -1, "max_total_tokens": 0}, ["max_answer_tokens: ", "max_total_tokens: "]),
        ({"wait": ()}, ["wait: expected a text, or a tuple of at least one, found ()"]),
    ],
)
def test_unfit_settings_are_refused_together(settings, problems):
    with pytest.raises(ValueError, match=r"expected|auto") as error:
        ThinkingBudget(**settings)
    for problem in problems:
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_thinking_tokens", "all"),
        ("min_thinking_tokens", None),
        ("num_ignore", True),
        ("num_ignore", 1.5),
        ("wait", ("Wait", 3)),
        ("wait", ["Wait"]),
        ("wait", None),
    ],
)
def test_settings_of_a_wrong_type_are_refused(key, value):
    # A TypeError where signatures are checked as well.
    with pytest.raises((ValueError, TypeError), match=key):
        ThinkingBudget(**{key: value})


def test_unfit_wait_texts_are_refused_together():
    budgets = [ThinkingBudget(wait=("Wait", "Stop")), ThinkingBudget(wait="<|im_end|>")]
    with pytest.raises(ValueError, match="wait: ") as error:
        build_tables(IDS["s1"], budgets, TOKENIZER)
    assert "the tokenizer does not know 'Stop'" in str(error.value)
    assert "'<|im_end|>' holds an end token of the profile 's1'" in str(error.value)
