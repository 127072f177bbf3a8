"""Contexts that are computed piece by piece, beginnings that rows share, and how little the others wait for them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s1jax.decoding import cache as cache_module
from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.cache import PagedCache
from s1jax.decoding.engine import Engine
from s1jax.decoding.prefill_queue import PIECE
from s1jax.decoding.profiles import PreparedPrompt
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished, Generation
from s1jax.decoding.sampling import Sampling
from s1jax.decoding.workload import no_words, unending
from s1jax.model.load import LoadedModel
from s1jax.model.paged_attention import PAGE, num_pages
from tests.decoding.conftest import untrained
from tests.decoding.test_pages import on_devices

LIMIT = 3 * PIECE
LENGTHS = [1, 2, 63, 64, 65, 129, 200, PIECE - 1, PIECE, PIECE + 1, PIECE + 65, 2 * PIECE, 2 * PIECE + 9]


@cache
def model(data: int, tensor: int) -> LoadedModel:
    return on_devices(untrained(4 * PIECE), data, tensor)


def context(kind: int, length: int) -> tuple[int, ...]:
    """Those of one kind begin alike; two kinds do so for a piece and a half."""
    ids = np.random.default_rng(kind).integers(0, 362, LIMIT)
    ids[: 3 * PIECE // 2] = np.random.default_rng(kind // 2).integers(0, 362, 3 * PIECE // 2)
    return tuple(ids[:length].tolist())


def held(loaded: LoadedModel, paged: PagedCache, batch: int, row: int, count: int) -> np.ndarray:
    """A row's keys in the last layer, which depend on all tokens up to each: the first so many of them."""
    assert paged.arrays is not None
    keys = np.asarray(paged.arrays[-1].keys)
    shards = loaded.mesh.shape["data"]
    first = row // (batch // shards) * (keys.shape[1] // shards)
    pages = paged.table([row], LIMIT)[0, : num_pages(count)]
    assert (pages > 0).all()
    return keys[:, first + pages].reshape(keys.shape[0], -1, keys.shape[3])[:, :count]


@cache
def alone(data: int, context_ids: tuple[int, ...]) -> np.ndarray:
    loaded = model(data, 1)
    with jax.set_mesh(loaded.mesh):
        paged = PagedCache(loaded, 2, 2 * LIMIT, share=False)
        paged.claim(LIMIT)
        paged.begin(0, context_ids, len(context_ids), prompt_length=len(context_ids))
        paged.fill(None)
    return held(loaded, paged, 2, 0, len(context_ids))


@pytest.mark.slow
@pytest.mark.parametrize("data", [1, 2])
@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(2 * LIMIT, 6 * LIMIT),
    operations=st.lists(
        st.tuples(
            st.sampled_from(["begin", "begin again", "fill", "fill all", "release", "decode", "shorten"]),
            st.integers(0, 5),
            st.integers(0, 3),
            st.sampled_from(LENGTHS),
        ),
        min_size=5,
        max_size=40,
    ),
)
@example(6 * LIMIT, [("begin", row, row // 2, 2 * PIECE + 9) for row in range(3)] + [("release", 0, 0, 1)])
@example(6 * LIMIT, [("begin", row, 0, PIECE + 65) for row in range(3)] + [("release", 1, 0, 1), ("release", 0, 0, 1)])
def test_rows_hold_their_contexts_whoever_computed_them(
    data: int, tokens: int, operations: list[tuple[str, int, int, int]]
) -> None:
    """Bit for bit what each would hold alone, with six rows that share, are dropped half-way, and decode."""
    loaded, batch = model(data, 1), 6
    contexts: dict[int, tuple[int, ...]] = {}
    """What rows began with."""
    prompts: dict[int, int] = {}
    lengths: dict[int, int] = {}
    """What is left of that."""
    with jax.set_mesh(loaded.mesh):
        paged = PagedCache(loaded, batch, tokens, share=True)
        paged.claim(LIMIT)
        for name, row, kind, length in [*operations, ("fill all", 0, 0, 0)]:
            if name.startswith("begin") and row not in contexts and paged.admits(row, length):
                contexts[row], lengths[row] = context(kind, length), length
                prompts[row] = length if name == "begin" else max(1, length - 100)
                paged.begin(row, contexts[row], length, prompt_length=prompts[row])
            elif name == "fill":
                paged.fill(PIECE)
            elif name == "fill all":
                paged.fill(None)
            elif name == "release" and row in contexts:
                del contexts[row]
                paged.release(row)
            elif row in contexts and row not in paged.unfilled:
                lengths[row] = max(prompts[row], min(length, lengths[row])) if name == "shorten" else lengths[row]
                paged.shorten(row, lengths[row])
                # From its last token on, a row writes to its pages.
                scribble(loaded, paged, batch, row, lengths[row] - 1)
            for other in set(contexts) - paged.unfilled:
                count = lengths[other] - 1
                np.testing.assert_array_equal(
                    held(loaded, paged, batch, other, count), alone(data, contexts[other])[:, :count]
                )
        for row in list(contexts):
            paged.release(row)
    assert paged.size[0] == 0
    assert not paged.unfilled


def scribble(loaded: LoadedModel, paged: PagedCache, batch: int, row: int, position: int) -> None:
    assert paged.arrays is not None
    page = int(paged.table([row], LIMIT)[0, position // PAGE])
    shards = loaded.mesh.shape["data"]
    at = row // (batch // shards) * (paged.arrays[0].keys.shape[1] // shards) + page
    paged.arrays = jax.tree.map(lambda x: x.at[:, at, position % PAGE :].set(jnp.nan), paged.arrays)


def requests(count: int, *, begin_alike: int, length: int) -> list[Request]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 362, begin_alike).tolist()
    lengths = rng.integers(begin_alike + 1, length, count)
    own = [rng.integers(0, 362, n - begin_alike).tolist() for n in lengths]
    budget = ThinkingBudget(wait="", max_answer_tokens=70)
    return [Request(PreparedPrompt((*shared, *ids), 0, False), budget, i) for i, ids in enumerate(own)]


def results(engine: Engine, all_requests: Sequence[Request]) -> dict[int, Generation]:
    found = (e for e in engine.run(all_requests) if isinstance(e, Finished))
    return {event.request.index: event.generation for event in found}


def engine_of(loaded: LoadedModel, **settings: bool | int) -> Engine:
    vocab_size = loaded.model.config.vocab_size
    return Engine(loaded, no_words(), unending(vocab_size), **{"batch_size": 4, **settings})


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 1), (2, 4)])
def test_long_prompts_that_begin_alike_end_as_the_whole_model_says(data: int, tensor: int) -> None:
    """Greedily, by the logits of all their tokens at once; shared or not, they end the same."""
    loaded = model(data, tensor)
    some = requests(9, begin_alike=PIECE + 70, length=PIECE + 400)
    found = results(engine_of(loaded), some)
    assert found == results(engine_of(loaded, share=False), some)
    with jax.set_mesh(loaded.mesh):
        for request in some[:3]:
            generation = found[request.index]
            ids = np.array([[*request.prompt.prompt_ids, *generation.output_ids]])
            ids = np.repeat(ids, data, axis=0)
            positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
            hidden, _ = jax.jit(loaded.model.hidden_states)(loaded.params, ids, positions)
            scores = np.asarray(loaded.model.logits(loaded.params, hidden))[0]
            drawn = scores[len(request.prompt.prompt_ids) - 1 : -1]
            chosen = np.take_along_axis(drawn, np.array(generation.output_ids)[:, None], axis=1)[:, 0]
            np.testing.assert_allclose(chosen, drawn.max(axis=1), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (4, 4)])
def test_with_an_int8_cache_prompts_that_share_pages_end_as_they_would_alone(data: int, tensor: int) -> None:
    """Two samples of each: the second copies the first's last page. All have their whole budgets."""
    loaded = model(data, tensor)
    loaded = replace(loaded, model=replace(loaded.model, cache_dtype="int8"))
    some = requests(4, begin_alike=PIECE + 70, length=PIECE + 200)
    some = [replace(request, sampling=Sampling(temperature=1.0)) for request in some]
    some += [replace(request, index=request.index + 4, sample=1) for request in some]
    found = results(engine_of(loaded, batch_size=8), some)
    assert found == results(engine_of(loaded, batch_size=8, share=False), some)
    for generation in found.values():
        assert len(generation.output_ids) == 70
    assert found != results(engine_of(model(data, tensor), batch_size=8), some)


@pytest.mark.slow
def test_pages_of_an_equal_beginning_are_held_once() -> None:
    loaded = model(1, 1)
    some = requests(4, begin_alike=2 * PIECE + 1, length=2 * PIECE + 30)
    used = {}
    for share in (False, True):
        engine = engine_of(loaded, share=share)
        for request in some:
            engine.submit(request)
        engine.step()
        used[share] = engine.occupancy.used_pages
    assert used[False] - used[True] == 3 * num_pages(2 * PIECE)


@pytest.mark.slow
def test_rows_at_work_wait_for_no_more_than_some_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of three pieces comes while others decode: two before one chunk, the last before the one after."""
    computed: list[int] = []
    prefill = cache_module.prefill

    def counted(*arguments):
        computed.append(arguments[3].shape[1])
        return prefill(*arguments)

    monkeypatch.setattr(cache_module, "prefill", counted)
    loaded = model(1, 1)
    engine = engine_of(loaded)
    first, long, last = requests(3, begin_alike=0, length=60)
    long = Request(PreparedPrompt(tuple(i % 362 for i in range(3 * PIECE - 9)), 0, False), long.budget, 1)
    expected = results(engine_of(loaded), [first, long, last])
    engine.submit(long)
    engine.cancel(long)
    engine.submit(first)
    computed.clear()
    # The chunk after the first is at work when a step returns.
    events = engine.step()
    assert computed == [PAGE]
    engine.submit(long)
    engine.submit(last)
    events += engine.step()
    assert computed == [PAGE, *[PIECE] * 2]
    assert engine.occupancy.rows == 1
    events += engine.step()
    assert computed == [PAGE, *[PIECE] * 3, PAGE]
    events += engine.run([])
    assert {e.request.index: e.generation for e in events if isinstance(e, Finished)} == expected
