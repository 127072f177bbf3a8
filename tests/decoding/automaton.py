"""The automaton run from lists, the plain rules run from the same, and what they wrote as marked text."""

from dataclasses import dataclass
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from s1jax.decoding.budget import (
    FinishReason,
    Phase,
    RowParams,
    RowState,
    Tables,
    ThinkingBudget,
    ThinkingEnd,
    build_tables,
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
END = "<|im_start|>"
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
    def next_token(context: list[int], masked: bool) -> int:
        return int(row.draws[int(masked), len(context)])

    return reference.run_budget(next_token, row.prompt, ids, row.budget, encode, CONTEXT_LENGTH)


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


def by_automaton(row: Row, ids: ProfileIds) -> reference.Result:
    [compiled], [stepped] = results([row], ids), results([row], ids, step_by_step)
    assert compiled == stepped
    return compiled
