"""The compiled loop against the plain rules, which transformers' model drives token by token."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s1jax
from s1jax.decoding import loop
from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.engine import STEPS_PER_CHUNK, Engine
from s1jax.decoding.pages import full_table
from s1jax.decoding.profiles import load_profile, prepare_prompt, tokenize_profile
from s1jax.decoding.requests import Request, problem_of
from s1jax.decoding.results import Finished, Generation
from s1jax.decoding.sampling import GREEDY, Draws, Sampling
from s1jax.decoding.slot import start_of
from s1jax.model.load import LoadedModel
from s1jax.model.paged_attention import num_pages
from tests.decoding.conftest import CONTEXT, ROOT, command, environment, run, untrained
from tests.processes import wait_until
from tests.reference import budget as reference


def profile_ids(loaded: LoadedModel, name: str):
    return tokenize_profile(load_profile(name), loaded.tokenizer, loaded.model.config.vocab_size)


def random_requests(loaded: LoadedModel, name: str, count: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    ids, requests = profile_ids(loaded, name), []
    waits = ["Wait", "", ("Wait", "Let me check"), "So "]
    for index in range(count):
        bound = [None, "auto", 0, 1, *rng.integers(2, 30, 6).tolist()][rng.integers(10)]
        budget = ThinkingBudget(
            max_thinking_tokens=bound,
            min_thinking_tokens=int(rng.choice([0, 0, 3, 12])),
            num_ignore=int(rng.integers(0, 4)),
            wait=waits[rng.integers(4)],
            max_answer_tokens=int(rng.integers(1, 12)),
            # The sentence that ends Qwen3's thinking is 75 tokens of the small tokenizer.
            max_total_tokens=int(rng.integers(120 if name == "qwen3" else 90, CONTEXT + 1)),
        )
        prompt = rng.integers(0, 362, rng.integers(1, 24)).tolist()
        requests.append(Request(prepare_prompt(prompt, ids), budget, index))
    return requests


def generate(loaded: LoadedModel, name: str, requests: list[Request], **options) -> dict[int, Generation]:
    engine = Engine(loaded, loaded.tokenizer, profile_ids(loaded, name), **{"batch_size": 8, **options})
    profile, context = profile_ids(loaded, name), loaded.model.config.max_position_embeddings
    assert not [problem for request in requests if (problem := problem_of(request, profile, context))]
    return {e.request.index: e.generation for e in engine.run(requests) if isinstance(e, Finished)}


def reference_model(directory: Path, loaded: LoadedModel, name: str):
    """Greedy next token of a context: transformers' where torch is installed, else from a pass over all of it."""
    ids = profile_ids(loaded, name)
    if sys.version_info < (3, 12):
        from tests.reference.transformers_model import GreedyModel

        return GreedyModel(directory, ids).next_token
    params = jax.device_put(jax.device_get(loaded.params), jax.devices()[0])

    @jax.jit
    def last_logits(padded, length):
        hidden, _ = loaded.model.hidden_states(params, padded[None], jnp.arange(CONTEXT)[None])
        return loaded.model.logits(params, hidden[0, length - 1])

    @cache
    def logits(context: tuple[int, ...]) -> np.ndarray:
        padded = np.zeros(CONTEXT, np.int32)
        padded[: len(context)] = context
        return np.asarray(last_logits(jnp.asarray(padded), len(context)))

    def next_token(context: list[int], masked: bool) -> int:
        scores = np.where(ids.valid, logits(tuple(context)), -np.inf)
        if masked:
            scores[list(ids.end_tokens)] = -np.inf
        return int(scores.argmax())

    return next_token


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s1", "qwen3", "none"])
def test_the_compiled_loop_equals_the_plain_rules(directory: Path, loaded: LoadedModel, name: str) -> None:
    """168 rows for each profile, 504 in all, on an 8x2 mesh, mixed in batches that rows leave and join."""
    ids, requests = profile_ids(loaded, name), random_requests(loaded, name, 168, seed=len(name))
    results, next_token = generate(loaded, name, requests), reference_model(directory, loaded, name)
    encode = partial(loaded.tokenizer.encode, add_special_tokens=False)
    kinds: Counter[str | None] = Counter()
    for request in requests:
        budget, result = request.budget, results[request.index]
        expected = reference.run_budget(next_token, request.prompt.prompt_ids, ids, budget, encode, CONTEXT)
        actual = asdict(result)
        for key, value in asdict(expected).items():
            assert actual[key] == value, (request, key)
        kinds[result.thinking_end] += 1
        kinds["waits"] += result.num_waits > 0
        bound = budget.max_thinking_tokens
        if isinstance(bound, int) and name != "none":
            assert result.num_thinking_tokens <= max(bound, request.prompt.num_thinking_tokens)
        if name == "s1" and result.thinking_end in ("budget", "context"):
            assert result.answer.startswith("\nFinal Answer:")
        assert max(result.output_ids, default=0) < 368
        assert result.text == loaded.tokenizer.decode(result.output_ids, skip_special_tokens=False)
    if name != "none":
        assert all(kinds[kind] >= 1 for kind in ("natural", "eos", "budget", "context")), kinds
        assert min(kinds["natural"] + kinds["eos"], kinds["budget"], kinds["waits"]) >= 10, kinds


@pytest.mark.slow
def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order(loaded: LoadedModel) -> None:
    """Each with a sampling of its own."""
    samplings = [
        Sampling(),
        Sampling(temperature=1.0, top_k=50, top_p=0.95),
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=3),
        Sampling(temperature=1.0, top_p=0.8, min_p=0.01),
    ]
    requests = [
        replace(request, sampling=samplings[request.index % len(samplings)], seed=request.index // 10)
        for request in random_requests(loaded, "s1", 24, seed=7)
    ]
    together = generate(loaded, "s1", requests)
    backwards = generate(loaded, "s1", requests[::-1], batch_size=16)
    for request in requests:
        assert backwards[request.index] == together[request.index]
    for request in requests[:7]:
        assert generate(loaded, "s1", [request])[request.index] == together[request.index]
    for other in ({"sample": 1}, {"seed": 7}):
        found = generate(loaded, "s1", [replace(request, **other) for request in requests])
        same = {request.index for request in requests if found[request.index] == together[request.index]}
        assert same >= {request.index for request in requests if request.sampling.temperature == 0}
        assert len(same) < len(requests) / 2


@pytest.mark.slow
def test_logprobs_are_those_of_the_model_forced_tokens_too(loaded: LoadedModel) -> None:
    results = generate(loaded, "s1", random_requests(loaded, "s1", 4, seed=1), logprobs=True)
    params = jax.device_put(jax.device_get(loaded.params), jax.devices()[0])
    for result in results.values():
        context = [*result.prompt_ids, *result.output_ids]
        padded = jnp.asarray(context + [0] * (CONTEXT - len(context)))[None]
        hidden, _ = loaded.model.hidden_states(params, padded, jnp.arange(CONTEXT)[None])
        logprobs = np.asarray(jax.nn.log_softmax(loaded.model.logits(params, hidden[0])))
        start = len(result.prompt_ids)
        expected = [logprobs[start + i - 1, token] for i, token in enumerate(result.output_ids)]
        np.testing.assert_allclose(result.logprobs, expected, rtol=0, atol=1e-4)


def test_nothing_goes_to_the_host_within_a_chunk_and_the_cache_is_not_copied(loaded: LoadedModel) -> None:
    model = loaded.model
    params = jax.device_put(jax.device_get(loaded.params), jax.devices()[0])
    requests = random_requests(loaded, "s1", 8, seed=2)
    tables, wait_starts = loop_tables(loaded, requests)
    rows = jax.device_put(start_of(requests, profile_ids(loaded, "s1"), wait_starts, CONTEXT, 8))
    shared = loop.Shared(tables, jnp.ones(384, bool), jnp.array([0], jnp.int32))
    table = full_table(1, 8, num_pages(8192))
    cache = loop.empty_cache(model, 1 + table.size)
    arguments = (model, Draws(greedy=True), STEPS_PER_CHUNK, False, params, shared, cache, jax.device_put(table), rows)
    compiled = loop.decode_chunk.lower(*arguments).compile()
    text = compiled.as_text()
    assert "while" in text
    assert not any(word in text for word in ("infeed", "outfeed", "send-done", "recv-done", "host_callback"))
    memory, size = compiled.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(cache))
    # Beside one layer's scores, nothing as large as a layer's keys: the cache is read and updated where it is.
    scores = 8 * model.config.num_attention_heads * 8192 * 4
    layer_keys = size / model.config.num_hidden_layers / 2
    assert memory.temp_size_in_bytes < 2 * scores + layer_keys / 2 < 0.5 * size
    assert memory.alias_size_in_bytes >= size
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(loop.decode_chunk(*arguments))


@pytest.mark.slow
def test_one_compilation_for_each_bucket_and_none_more_than_said(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    ids = profile_ids(loaded, "s1")

    def requests(seed: int) -> list[Request]:
        rng = np.random.default_rng(seed)
        budgets = [ThinkingBudget(limit, num_ignore=3, max_answer_tokens=8) for limit in (5, 60, 110, 20)]
        lengths = (9, 20, 30, 7)
        return [
            Request(
                prepare_prompt(rng.integers(0, 362, length).tolist(), ids),
                budget,
                index,
                sampling=Sampling(temperature=0.7),
            )
            for index, (length, budget) in enumerate(zip(lengths, budgets, strict=True))
        ]

    jax.clear_caches()
    first = compiled(lambda: generate(loaded, "s1", requests(0)), caplog)
    # One size of prompts; all eight rows, then the two quarters in which the last requests end.
    assert first == {"prefill": 1, "empty_cache": 1, "copy_pages": 0, "decode_chunk": 2}
    engine = Engine(loaded, loaded.tokenizer, ids)
    assert first.total() <= engine.compilations(requests(0))
    assert compiled(lambda: generate(loaded, "s1", requests(1)), caplog).total() == 0


@pytest.mark.slow
def test_what_was_compiled_beforehand_is_not_when_requests_come(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    ids = profile_ids(loaded, "s1")
    alone = untrained(CONTEXT)
    engine = Engine(alone, loaded.tokenizer, ids, batch_size=4, steps_per_chunk=4)
    draws = Draws(greedy=True, whole=True, candidates=16, top_p=True, min_p=True)
    samplings = (GREEDY, Sampling(0.7), Sampling(0.7, top_k=9), Sampling(1.0, top_p=0.9), Sampling(1.0, min_p=0.1))
    budget = ThinkingBudget(6, max_answer_tokens=4)
    requests = [
        Request(prepare_prompt([7] * length, ids), budget, index, sampling=sampling)
        for index, (length, sampling) in enumerate(product((1, 1, 50, 90, 120), samplings))
    ]
    jax.clear_caches()
    first = compiled(lambda: engine.compile(draws, CONTEXT), caplog)
    # Of all four rows and of one, greedy or not; and prompts of all sizes.
    assert first == {"prefill": 4, "empty_cache": 1, "copy_pages": 1, "decode_chunk": 4}
    assert compiled(lambda: list(engine.run(requests)), caplog).total() == 0
    with pytest.raises(ValueError, match="and a row has room for 64"):
        Engine(alone, loaded.tokenizer, ids, cache_tokens=64).compile(draws, 65)


def compiled(call: Callable[[], object], caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """How many programs a call compiles, by name."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        call()
    messages = (re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage()) for record in caplog.records)
    names = Counter(message[1] for message in messages if message)
    return Counter({name: names[name] for name in ("prefill", "empty_cache", "copy_pages", "decode_chunk")})


def loop_tables(loaded: LoadedModel, requests: list[Request]):
    from s1jax.decoding.budget import build_tables

    return build_tables(profile_ids(loaded, "s1"), [r.budget for r in requests], loaded.tokenizer)


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again_every_prompt_is_there_once(directory: Path, tmp_path: Path) -> None:
    prompts, whole, target = tmp_path / "prompts.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"What is {i} + 3?", "max_thinking_tokens": i % 40} for i in range(200)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    undisturbed = run(directory, f"prompts={prompts}", f"output={whole}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    words = command(directory, f"prompts={prompts}", f"output={target}")
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    wait_until(lambda: target.exists() and len(target.read_bytes().splitlines()) >= 20, [process])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(target.read_text().splitlines()) < 200
    assert run(directory, f"prompts={prompts}", f"output={target}").returncode == 0
    assert sorted(target.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    assert sorted(json.loads(line)["id"] for line in target.read_text().splitlines()) == sorted(r["id"] for r in rows)
    refused = run(directory, f"prompts={prompts}", f"output={target}", "sampling.seed=3")
    assert refused.returncode == 1
    assert "written with other values of sampling" in refused.stderr
    refused = run(directory, f"prompts={prompts}", f"output={target}", "cache.dtype=int8")
    assert refused.returncode == 1
    assert "written with other values of cache.dtype" in refused.stderr


def test_every_bad_prompt_is_listed_before_anything_is_computed(directory: Path, tmp_path: Path) -> None:
    prompts, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [
        "{",
        '{"prompt": " "}',
        '{"prompt": "a", "messages": []}',
        '{"input_ids": [1, 380]}',
        '{"prompt": "a", "max_thinking_tokens": -1}',
        '{"prompt": "a", "id": 1}',
        '{"prompt": "b", "id": 1}',
        '{"messages": [{"role": "user"}]}',
        json.dumps({"prompt": "a", "num_ignore": ["a"] * 1000}),
    ]
    prompts.write_text("\n".join(lines))
    result = run(directory, f"prompts={prompts}", f"output={target}")
    assert result.returncode == 1
    for part in (
        "line 1: not JSON",
        "line 2: prompt is empty",
        "line 3: expected one of prompt, messages and input_ids, found prompt and messages",
        "line 4: ids [380] are not the tokenizer's",
        "line 5: max_thinking_tokens: expected a whole number of at least 0",
        "line 7: id 1 is that of line 6 too",
        "line 8: messages: a message has no content",
        "line 9: num_ignore: expected a whole number of at least 0",
    ):
        assert part in result.stderr
    assert max(map(len, result.stderr.splitlines())) < 300
    assert not target.exists()
    prompts.write_text("")
    assert run(directory, f"prompts={prompts}", f"output={target}").returncode == 0
    assert target.read_text() == ""
    long = run(directory, "prompt=" + "long " * 200)
    assert long.returncode == 1
    assert "no room to answer" in long.stderr
    both = run(directory, "prompt=a", f"prompts={prompts}")
    assert both.returncode == 1
    assert "either prompts" in both.stderr


def test_what_generation_config_ends_texts_with_ends_them(loaded: LoadedModel, tmp_path: Path) -> None:
    shutil.copytree(loaded.directory, tmp_path / "model")
    copy, settings = replace(loaded, directory=tmp_path / "model"), tmp_path / "model" / "generation_config.json"
    budget = ThinkingBudget(max_answer_tokens=12)

    def answer(profile: str = "none") -> list[int]:
        return s1jax.generate(copy, ["How many apples?"], budget, profile=profile)[0].output_ids

    settings.unlink()
    before = answer()
    further = before[-1]
    settings.write_text(json.dumps({"eos_token_id": [364, further]}))
    assert answer() == before[: before.index(further)]
    settings.write_text(json.dumps({"eos_token_id": further}))
    assert answer() == before[: before.index(further)]
    for eos in ("364", [1, None], -1, True, {}):
        settings.write_text(json.dumps({"eos_token_id": eos}))
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: expected ids, found "):
            answer()
    settings.write_text("[" * 10_000)
    with pytest.raises(ValueError, match=r"generation_config\.json: not usable JSON: it is nested too deeply"):
        answer()


@pytest.mark.slow
def test_requests_may_come_while_others_decode_and_be_dropped(loaded: LoadedModel) -> None:
    """Nothing changes for others, be they submitted late, with wait texts of their own, or beside what is dropped."""
    requests = random_requests(loaded, "s1", 24, seed=11)
    alone = generate(loaded, "s1", requests)
    dropped = {2, 3, 12, 20}
    engine = Engine(loaded, loaded.tokenizer, profile_ids(loaded, "s1"), batch_size=8)
    found: dict[int, Generation] = {}
    late = iter(requests)
    for request in [next(late) for _ in range(10)]:
        engine.submit(request)
    engine.cancel(requests[3])  # It waits.
    while not engine.is_idle:
        for event in engine.step():
            assert event.request.index not in found
            if isinstance(event, Finished):
                found[event.request.index] = event.generation
        for index in (2, 12, 20):
            engine.cancel(requests[index])  # It is at work, waits, or has finished.
        if request := next(late, None):
            engine.submit(request)
    assert set(found) >= {r.index for r in requests} - dropped
    assert found.items() <= alone.items()
    assert 3 not in found
    assert engine.step() == []
    with pytest.raises(ValueError, match="prompt 0: no room to answer"):
        engine.submit(replace(requests[0], budget=ThinkingBudget(max_total_tokens=1)))
    with pytest.raises(ValueError, match="end token"):
        engine.submit(replace(requests[0], budget=ThinkingBudget(wait="<|im_start|>")))
    assert engine.is_idle


@pytest.mark.slow
def test_what_follows_a_request_that_is_dropped_is_decoded_all_the_same(loaded: LoadedModel) -> None:
    prompt = random_requests(loaded, "s1", 1, seed=4)[0].prompt
    budgets = [ThinkingBudget(max_thinking_tokens=limit, max_answer_tokens=4) for limit in (70, 9, 3, 40)]
    requests = [Request(prompt, budget, 0) for budget in budgets]
    ids = profile_ids(loaded, "s1")
    engine = Engine(loaded, loaded.tokenizer, ids, share=False)
    alone = [e.generation for r in requests for e in engine.run([r]) if isinstance(e, Finished)]
    engine = Engine(loaded, loaded.tokenizer, ids)
    for request in requests:
        engine.submit(request)
    events = engine.step()
    engine.cancel(requests[0])
    events += engine.run([])
    finished = {id(e.request): e.generation for e in events if isinstance(e, Finished)}
    if id(requests[0]) in finished:
        assert finished.pop(id(requests[0])) == alone[0]
    assert finished == {id(r): result for r, result in zip(requests[1:], alone[1:], strict=True)}
