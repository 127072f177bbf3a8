"""Hours of an evaluation: the simulated scheduling against the engine's own, and the plan as a person asks for it."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.engine import STEPS_PER_CHUNK, Engine
from s1jax.decoding.profiles import PreparedPrompt
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished
from s1jax.decoding.workload import no_words, unending
from s1jax.model.paged_attention import PAGE, num_pages
from s1jax.planning.evaluation import simulate
from tests.decoding.conftest import untrained
from tests.planning.conftest import plan, run
from tests.tiny import QWEN2


@settings(deadline=None, max_examples=100)
@given(
    groups=st.lists(
        st.lists(st.tuples(st.integers(1, 300), st.integers(1, 400)), min_size=1, max_size=3), min_size=1, max_size=12
    ),
    rows=st.integers(1, 5),
    spare=st.integers(0, 10),
)
def test_all_tokens_are_decoded_in_the_pages_that_there_are(groups, rows: int, spare: int) -> None:
    pages = max(num_pages(before + own) for group in groups for before, own in group) + spare
    seen = []

    def seconds(contexts) -> float:
        seen.append(len(contexts))
        return 1.0

    result = simulate(groups, rows, pages, seconds, 0.0)
    assert result.decoded_tokens == sum(own for group in groups for _, own in group)
    assert result.most_pages <= pages
    assert result.steps == result.seconds == STEPS_PER_CHUNK * len(seen)
    assert max(seen) <= rows
    if rows == 1:
        assert result.put_back == 0
        assert result.steps == sum(-(-own // STEPS_PER_CHUNK) * STEPS_PER_CHUNK for group in groups for _, own in group)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [4 * 640, 640 + PAGE])
def test_the_engine_takes_the_chunks_that_are_simulated(tokens: int) -> None:
    rng = np.random.default_rng(0)
    loaded = untrained(640)
    vocab_size = loaded.model.config.vocab_size
    requests = [
        Request(
            PreparedPrompt(tuple(rng.integers(0, vocab_size, rng.integers(1, 200)).tolist()), 0, False),
            ThinkingBudget(wait="", max_answer_tokens=int(rng.integers(1, 430))),
            index,
        )
        for index in range(14)
    ]
    engine = Engine(loaded, no_words(), unending(vocab_size), batch_size=4, cache_tokens=tokens, share=False)
    for request in requests:
        engine.submit(request)
    chunks = used = decoded = 0
    while not engine.is_idle:
        events = engine.step()
        chunks += 1
        used = max(used, engine.occupancy.used_pages)
        decoded += sum(len(event.output_ids) for event in events if not isinstance(event, Finished))
    groups = [[(len(r.prompt.prompt_ids), r.budget.max_answer_tokens or 0)] for r in requests]
    simulated = simulate(groups, 4, tokens // PAGE, lambda contexts: 1.0, 0.0)
    assert (simulated.steps, simulated.decoded_tokens) == (STEPS_PER_CHUNK * chunks, decoded)
    assert used <= simulated.most_pages
    assert (simulated.put_back > 0) == (tokens < 4 * 640)


@pytest.mark.slow
def test_an_evaluation_is_planned_from_lengths_or_from_an_earlier_one(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32, "num_key_value_heads": 8}
    others = {"head_dim": 128, "vocab_size": 8192, "num_hidden_layers": 2, "max_position_embeddings": 32_768}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, **sizes, **others}))
    words = ["decode.py", "evaluate", f"model.path={tmp_path}", f"output_dir={tmp_path / 'run'}", "tasks=aime24"]
    words += ["batch_size=8", "mesh.tensor=4", "plan.price_per_device_hour=2", "sweep.max_thinking_tokens=0,512,auto"]
    lengths = "plan.lengths=lognormal:4000:16000"
    content = plan(tmp_path / "plan.json", *words, lengths, "--plan", "h100:1x4")
    assert "30 questions x 1 samples x 3 runs" in content["text"]
    assert "at 2 a device-hour" in content["text"]
    decoded = content["evaluation"]["decoded_tokens"]
    assert decoded == pytest.approx(30 * (4000 + 2 * 500), rel=0.02)
    assert content["held_tokens"] == pytest.approx(30 * (4000 + 500 + 1012), rel=0.02)
    assert content["padded"]["seconds"] / content["evaluation"]["seconds"] > 1
    assert content["evaluation"]["put_back"] == 0
    scarce = plan(tmp_path / "plan.json", *words, lengths, "cache.tokens=18000", "--plan", "h100:1x4")["evaluation"]
    assert scarce["put_back"] > 0
    assert scarce["decoded_tokens"] == decoded
    assert scarce["most_pages"] * PAGE <= 18_048

    line = {"task": "t", "id": "1", "sample": 0, "prompt_ids": [1, 2, 3]}
    outputs = {"a": list(range(100)), "b": [*range(40), 7, 8], "c": list(range(100))}
    rows = [json.dumps({**line, "run": run, "output_ids": ids}) for run, ids in outputs.items()]
    (tmp_path / "samples.jsonl").write_text("\n".join(rows) + "\n")
    measured = f"plan.lengths={tmp_path / 'samples.jsonl'}"
    content = plan(tmp_path / "plan.json", *words, measured, "--plan", "h100:1x4")
    assert (content["evaluation"]["decoded_tokens"], content["held_tokens"]) == (102, 242)
    alone = plan(tmp_path / "plan.json", *words, measured, "sweep.share=false", "--plan", "h100:1x4")
    assert alone["evaluation"]["decoded_tokens"] == 242
    wrong = run(*words, "plan.lengths=lognormal:400", "--plan", "h100:1x4")
    assert "error: plan.lengths: lognormal:400 is not lognormal:MEAN:MAX" in wrong.stderr
    for text, message in (("{}\n", "is not the samples.jsonl"), ("no\n", "not JSON")):
        (tmp_path / "samples.jsonl").write_text(text)
        process = run(*words, measured, "--plan", "h100:1x4")
        assert process.returncode == 1
        assert message in process.stderr
