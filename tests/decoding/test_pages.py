"""Pages of a cache: none is lost, none has two writers, and what the engine computes in them is what it always was."""

from collections import Counter
from dataclasses import replace
from typing import Literal

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.engine import Engine
from s1jax.decoding.pages import PagePool
from s1jax.decoding.profiles import PreparedPrompt, prepare_prompt
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished, Generation
from s1jax.decoding.sampling import Sampling
from s1jax.decoding.setup import rows_of
from s1jax.decoding.workload import no_words, unending
from s1jax.mesh import make_mesh
from s1jax.model.load import LoadedModel
from s1jax.model.paged_attention import PAGE, num_pages
from tests.decoding.conftest import CONTEXT, untrained
from tests.decoding.test_generate import profile_ids, random_requests

OPERATIONS = ("submit", "fork", "grow", "shorten", "put back")


def operate(count: int, operations: list[tuple[str, int, int]]) -> None:
    """Do as the engine does, each operation with a row and a number, and check the pool after each."""
    pool, rows = PagePool(count), {}
    shared: dict[int, int] = {}
    """Of each row, how many of its first pages are for reading only."""
    for name, which, number in operations:
        row = sorted(rows)[which % len(rows)] if rows else None
        new = max(rows, default=-1) + 1
        if name == "submit":
            if (pages := pool.take(number)) is not None:
                rows[new], shared[new] = pages, 0
        elif row is None:
            continue
        elif name == "fork":
            # Whole pages are shared, and the one that is written to next is new.
            whole = min(number, max(0, len(rows[row]) - 1))
            if (own := pool.take(1)) is not None:
                pool.share(rows[row][:whole])
                rows[new], shared[new] = rows[row][:whole] + own, whole
                shared[row] = max(shared[row], whole)
        elif name == "grow":
            before = pool.num_free
            if (pages := pool.take(number)) is None:
                assert number > before == pool.num_free
            else:
                rows[row] += pages
        elif name == "shorten":
            kept = max(number, shared[row] + 1)
            pool.release(rows[row][kept:])
            del rows[row][kept:]
        else:
            pool.release(rows.pop(row))
        users = Counter(page for pages in rows.values() for page in pages)
        assert 0 not in users
        assert pool.num_used == len(users)
        assert pool.num_free + pool.num_used == count - 1
        writers = Counter(page for row, pages in rows.items() for page in pages[shared[row] :])
        assert all(users[page] == 1 for page in writers)
    for pages in rows.values():
        pool.release(pages)
    everything = pool.take(count - 1)
    assert everything is not None
    assert sorted(everything) == list(range(1, count))
    assert pool.take(1) is None


@given(
    count=st.integers(1, 20),
    operations=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 6)), max_size=30),
)
def test_no_page_is_lost_or_written_to_by_two(count: int, operations: list[tuple[str, int, int]]) -> None:
    operate(count, operations)


@pytest.mark.slow
def test_no_page_is_lost_in_a_hundred_thousand_random_sequences() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100_000):
        length = rng.integers(1, 10)
        names = [OPERATIONS[i] for i in rng.integers(0, len(OPERATIONS), length)]
        numbers = rng.integers(0, (10, 7), (length, 2)).tolist()
        operate(int(rng.integers(1, 20)), [(name, *pair) for name, pair in zip(names, numbers, strict=True)])


def on_devices(loaded: LoadedModel, data: int, tensor: int) -> LoadedModel:
    mesh = make_mesh(data, 1, tensor, jax.devices()[: data * tensor])
    shardings = jax.tree.map(lambda a: a.sharding, loaded.model.abstract_params(mesh, stacked=False))
    return replace(loaded, params=jax.device_put(jax.device_get(loaded.params), shardings), mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "tensor", "batch_size", "temperature"), [(1, 1, 8, 0.0), (1, 1, 8, 0.8), (2, 4, 8, 0.8), (8, 2, 24, 0.0)]
)
def test_requests_that_are_put_back_end_as_if_they_had_not_been(
    loaded: LoadedModel, data: int, tensor: int, batch_size: int, temperature: float
) -> None:
    """With pages for one row of each shard at its longest, and one page more; some share prompts, runs and samples."""
    # Long enough to need more than one page, which small answers are not.
    long = {"max_thinking_tokens": "auto", "min_thinking_tokens": 80, "max_answer_tokens": 20, "max_total_tokens": None}
    requests = [replace(r, budget=replace(r.budget, **long)) for r in random_requests(loaded, "s1", 20, seed=5)]
    short = {"max_thinking_tokens": 30, "min_thinking_tokens": 0}
    requests += [replace(r, budget=replace(r.budget, **short)) for r in requests[:3]]
    requests += [replace(r, sample=1) for r in requests[:3]]
    requests = [replace(r, sampling=Sampling(temperature=temperature)) for r in requests]
    loaded = on_devices(loaded, data, tensor)
    ids = profile_ids(loaded, "s1")
    plenty = Engine(loaded, loaded.tokenizer, ids, batch_size=batch_size, share=False)
    alone = {id(e.request): e.generation for e in plenty.run(requests) if isinstance(e, Finished)}
    tokens = data * (num_pages(CONTEXT) + 1) * PAGE
    engine = Engine(loaded, loaded.tokenizer, ids, cache_tokens=tokens, batch_size=batch_size)
    for request in requests:
        engine.submit(request)
    dropped = (requests[1], requests[14])
    found: dict[int, Generation] = {}
    put_back = steps = 0
    while not engine.is_idle:
        at_work, events = engine.occupancy.rows, engine.step()
        finished = [event for event in events if isinstance(event, Finished)]
        found |= {id(event.request): event.generation for event in finished}
        assert engine.occupancy.used_pages <= engine.occupancy.pages == tokens // PAGE
        put_back += engine.occupancy.rows < at_work - len(finished)
        steps += 1
        for request in dropped if steps == 3 else ():
            engine.cancel(request)
    assert put_back > 0
    assert engine.occupancy.used_pages == 0
    assert set(found) >= {id(request) for request in requests} - set(map(id, dropped))
    assert {key: alone[key] for key in found} == found


@pytest.mark.slow
def test_rows_with_one_prompt_hold_its_pages_once(loaded: LoadedModel) -> None:
    loaded = on_devices(loaded, 1, 1)
    ids = profile_ids(loaded, "s1")
    prompt = prepare_prompt(np.random.default_rng(0).integers(0, 362, PAGE + 5).tolist(), ids)
    budget = ThinkingBudget(max_thinking_tokens=45, min_thinking_tokens=40, max_answer_tokens=9)
    requests = [Request(prompt, budget, 0, sample, Sampling(temperature=1.0)) for sample in range(8)]
    results = {}
    for share in (False, True):
        engine = Engine(loaded, loaded.tokenizer, ids, batch_size=8, share=share)
        for request in requests:
            engine.submit(request)
        events = engine.step()
        # One page is full of the prompt; what follows is each row's own.
        assert engine.occupancy.used_pages == (1 + 2 * 8 if share else 3 * 8)
        events += engine.run([])
        results[share] = {e.request.sample: e.generation for e in events if isinstance(e, Finished)}
    assert len(results[True]) == 8
    assert results[True] == results[False]


def test_a_row_that_the_pages_do_not_hold_is_refused(loaded: LoadedModel) -> None:
    ids = profile_ids(loaded, "s1")
    request = Request(prepare_prompt([5], ids), ThinkingBudget(max_answer_tokens=9), 0)
    engine = Engine(loaded, loaded.tokenizer, ids, cache_tokens=CONTEXT - 1)
    with pytest.raises(ValueError, match=r"prompt 0: may need 160 tokens, and cache\.tokens is 159"):
        engine.submit(request)
    # Each of eight shards has a part of the pages.
    engine = Engine(loaded, loaded.tokenizer, ids, cache_tokens=CONTEXT)
    with pytest.raises(ValueError, match="prompt 0: may need 160 tokens, and a row has room for 64"):
        list(engine.run([request]))


@pytest.mark.slow
def test_pages_for_less_than_the_size_that_is_compiled_for_are_enough() -> None:
    """A row of 400 tokens, which is compiled for 512, in pages for 448; then one for which more must be claimed."""
    loaded = untrained(640)
    vocab_size = loaded.model.config.vocab_size
    engine = Engine(loaded, no_words(), unending(vocab_size), cache_tokens=400, batch_size=2)

    def request(index: int, tokens: int) -> Request:
        prompt = PreparedPrompt(tuple(range(index + 1, index + 11)), 0, False)
        return Request(prompt, ThinkingBudget(wait="", max_answer_tokens=tokens - 10), index)

    short, long = request(0, 60), request(1, 400)
    engine.submit(short)
    events = engine.step()
    assert engine.occupancy.pages == 2 * 2
    engine.submit(long)
    events += engine.run([])
    assert engine.occupancy.pages == 7
    lengths = {e.request.index: len(e.generation.output_ids) for e in events if isinstance(e, Finished)}
    assert lengths == {0: 50, 1: 390}


@pytest.mark.parametrize(
    ("asked", "data", "requests", "rows"),
    [
        ("auto", 1, 1, 1),
        ("auto", 1, 5, 8),
        ("auto", 1, 1000, 8),
        ("auto", 4, 3, 4),
        ("auto", 4, 1000, 32),
        (6, 4, 1, 8),
    ],
)
def test_rows_are_as_many_as_are_worth_while(asked: int | Literal["auto"], data: int, requests: int, rows: int) -> None:
    assert rows_of(asked, make_mesh(data, 1, 1, jax.devices()[:data]), requests) == rows
