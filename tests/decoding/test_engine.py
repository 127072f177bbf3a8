"""The engine against the plain rules, with a model whose next token is a hash of what its row's pages hold."""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.engine import Engine
from s1jax.decoding.profiles import ProfileIds, prepare_prompt
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished, Generation
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.load import LoadedModel
from s1jax.model.paged_attention import PAGE, num_pages, write
from s1jax.model.qwen import Qwen
from tests.decoding.test_forks import thinking
from tests.decoding.test_profiles import IDS, TOKENIZER, VOCAB_SIZE, encode
from tests.reference import budget as reference
from tests.tiny import QWEN2

CONTEXT = 320
ODD = 2654435761
FACTORS = np.cumprod(np.full(2 * CONTEXT, ODD, np.uint32), dtype=np.uint32)
"""Of each position: the order of tokens counts, too."""
PROMPTS = ["hi user a b c", "Wait a d", " a b c d Hmm" * 26 + " a", " a b c d Hmm" * 26 + " b"]
"""The last two have whole pages in common."""


def mixed(x: Any) -> Any:
    """Numbers of which each bit depends on all bits of these."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * x.dtype.type(factor)
    return x ^ (x >> 16)


def scores(code: Any, of: Any, ends: Any) -> Any:
    """Of each token after the contexts of this code, [..., vocab]; one in 16 draws an end token."""
    own = mixed(code[..., None] ^ (of * of.dtype.type(ODD))) >> 11
    is_end = (mixed(code + code.dtype.type(1)) % 16 == 0)[..., None]
    return own + ends * (is_end * own.dtype.type(2**22))


@dataclass(frozen=True)
class HashModel(Qwen):
    """A page that is another row's, late or missing makes all that follows another text."""

    ends: tuple[int, ...] = ()

    def hidden_states(self, params: Any, input_ids: Any, positions: Any, *_: Any, **others: Any) -> Any:
        """The context's code in the first two columns, where one token is asked for."""
        (layer,), table = others["cache"], others["page_table"]
        shape = (*input_ids.shape, self.config.num_key_value_heads, self.config.head_dim)
        tokens = jnp.broadcast_to(input_ids[..., None, None], shape).astype(self.dtype)
        layer = write(layer, tokens, tokens, table, positions)
        held = layer.keys[0, table, :, 0].reshape(len(table), -1).astype(jnp.uint32)
        seen = jnp.arange(held.shape[1]) <= positions[:, -1:]
        factors = jnp.asarray(FACTORS)[: held.shape[1]]
        code = jnp.sum(jnp.where(seen, (held + 1) * factors, 0), axis=1, dtype=jnp.uint32)
        hidden = jnp.zeros((*input_ids.shape, self.config.hidden_size), jnp.float32)
        halves = jnp.stack([code >> 16, code & 0xFFFF], axis=-1).astype(jnp.float32)
        return hidden.at[..., :2].set(halves[:, None]), (layer,)

    def logits(self, params: Any, hidden: Any) -> Any:
        """Whole numbers that float32 has exactly."""
        code = (hidden[..., 0].astype(jnp.uint32) << 16) | hidden[..., 1].astype(jnp.uint32)
        tokens = jnp.arange(self.config.vocab_size, dtype=jnp.uint32)
        ends = jnp.zeros(self.config.vocab_size, jnp.uint32).at[jnp.array(self.ends)].set(1)
        return scores(code, tokens, ends).astype(jnp.float32)


def next_token_of(ids: ProfileIds) -> Any:
    """The model as plain rules have it."""
    ends = np.isin(np.arange(VOCAB_SIZE), ids.end_tokens).astype(np.uint32)

    def next_token(context: list[int], masked: bool) -> int:
        code = np.sum((np.array(context, np.uint32) + 1) * FACTORS[: len(context)], dtype=np.uint32)
        of = scores(np.array([code]), np.arange(VOCAB_SIZE, dtype=np.uint32), ends)[0].astype(np.int64)
        of[~ids.valid] = -1
        if masked:
            of[list(ids.end_tokens)] = -1
        return int(np.argmax(of))

    return next_token


@pytest.fixture(scope="module")
def hashing() -> dict[str, LoadedModel]:
    """For each profile, its model."""
    small = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 1, "max_position_embeddings": CONTEXT, "hidden_size": 32}
    config = QwenConfig.from_hf({**QWEN2, **small})
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    models = {}
    for name in ("s1", "qwen3"):
        model = HashModel(config, dtype=jnp.float32, ends=IDS[name].end_tokens)
        with jax.set_mesh(mesh):
            models[name] = LoadedModel(model, jax.jit(model.unstack)(model.init(jax.random.key(0), mesh)), mesh, Path())
    return models


@dataclass(frozen=True)
class Asked:
    """A request, the chunk before which it comes, and the one before which it is cancelled, if any."""

    request: Request
    comes: int
    goes: int | None


@st.composite
def asked(draw: st.DrawFn, ids: ProfileIds) -> list[Asked]:
    """Requests of few prompts, so that some have everything but the budget in common."""
    all_asked = []
    for _ in range(draw(st.integers(1, 14))):
        prompt = draw(st.integers(0, len(PROMPTS) - 1))
        answer, total = draw(st.none() | st.integers(1, 30)), draw(st.none() | st.integers(180, CONTEXT))
        budget = ThinkingBudget(**draw(thinking), max_answer_tokens=answer, max_total_tokens=total)
        if draw(st.booleans()):
            limit = draw(st.integers(20, 90))
            budget = replace(budget, max_thinking_tokens=limit, min_thinking_tokens=draw(st.integers(0, limit)))
        prepared = prepare_prompt(encode(PROMPTS[prompt]), ids)
        request = Request(prepared, budget, prompt, draw(st.integers(0, 1)))
        comes = draw(st.integers(0, 3))
        goes = draw(st.none() | st.integers(comes + 1, comes + 8)) if draw(st.booleans()) else None
        all_asked.append(Asked(request, comes, goes))
    return all_asked


def decode(engine: Engine, all_asked: list[Asked]) -> dict[int, Generation]:
    """The results by the place of what was asked, what was streamed before them held against them."""
    places = {id(one.request): place for place, one in enumerate(all_asked)}
    streamed: dict[int, list[int]] = defaultdict(list)
    results: dict[int, Generation] = {}
    turn, last = 0, max(one.comes for one in all_asked)
    while turn <= last or not engine.is_idle:
        for one in all_asked:
            if one.comes == turn:
                engine.submit(one.request)
            if one.goes == turn:
                engine.cancel(one.request)
        for event in engine.step():
            place = places[id(event.request)]
            goes = all_asked[place].goes
            assert goes is None or turn < goes, "it was cancelled"
            assert place not in results, "it had finished"
            if isinstance(event, Finished):
                results[place] = event.generation
                assert event.generation.output_ids[: len(streamed[place])] == streamed[place]
            else:
                streamed[place] += event.output_ids
        turn += 1
    return results


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_comes_and_goes_each_result_is_that_of_the_plain_rules(
    hashing: dict[str, LoadedModel], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(hashing)))
    ids = IDS[name]
    all_asked = data.draw(asked(ids))
    engine = Engine(
        hashing[name],
        TOKENIZER,
        ids,
        batch_size=data.draw(st.sampled_from([1, 4])),
        cache_tokens=data.draw(st.none() | st.sampled_from([num_pages(CONTEXT) * PAGE, 7 * PAGE, 10 * PAGE])),
        share=data.draw(st.booleans()),
        steps_per_chunk=data.draw(st.sampled_from([3, 32])),
    )
    results = decode(engine, all_asked)
    for place, one in enumerate(all_asked):
        if place not in results:
            assert one.goes is not None
            continue
        result, prompt = results[place], list(one.request.prompt.prompt_ids)
        expected = reference.run_budget(next_token_of(ids), prompt, ids, one.request.budget, encode, CONTEXT)
        for field, value in vars(expected).items():
            assert getattr(result, field) == value, field
    assert engine.occupancy[:2] == (0, 0)
    assert engine.occupancy.used_pages == 0
