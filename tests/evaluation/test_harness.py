"""The adapter for lm-evaluation-harness, held against the harness with transformers, and against `generate`."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from s1jax import Sampling, ThinkingBudget, generate
from s1jax.evaluation.harness import S1jaxLM
from s1jax.model.load import LoadedModel
from tests.decoding.conftest import CONTEXT, ROOT, environment

TEXTS = ["the sum of 3 and 4 is 7.", "How many apples does she have? Let me check", "12 * 5 = 60.\n" * 30]


@pytest.fixture(scope="module")
def lm(directory: Path) -> S1jaxLM:
    return S1jaxLM(pretrained=str(directory), dtype="float32", batch_size="16", fsdp=8, tensor=2)


@pytest.fixture(scope="module")
def peer(directory: Path) -> Any:
    """The harness's own way to run the same model: transformers."""
    torch = pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    return HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1, max_length=CONTEXT)


def requests(kind: Any, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, own, index, repeats=1) for index, own in enumerate(arguments)]


def test_scores_are_those_of_the_harness_with_transformers(lm: S1jaxLM, peer: Any) -> None:
    arguments = [(text[:half], text[half:]) for text in TEXTS[:2] for half in (0, len(text) // 2)]
    # A space that the harness moves, and a context that is cut in front.
    arguments += [("The answer ", "is 7"), (TEXTS[2], "12 * 5")]
    ours, theirs = (model.loglikelihood(requests("loglikelihood", arguments)) for model in (lm, peer))
    for (logprob, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert logprob == pytest.approx(expected, rel=1e-4)
        assert greedy == expected_greedy
    rolling = requests("loglikelihood_rolling", [(text,) for text in [*TEXTS, ""]])
    assert len(lm.tok_encode(TEXTS[2])) > CONTEXT
    assert lm.loglikelihood_rolling(rolling) == pytest.approx(peer.loglikelihood_rolling(rolling), rel=1e-4)


def test_plain_generation_is_that_of_the_harness_with_transformers(lm: S1jaxLM, peer: Any) -> None:
    contexts = [*TEXTS, "You are a helpful assistant."]
    # The model's padding rows are its likeliest ids, which only s1jax keeps from being emitted.
    valid = lm._profiles[False].valid
    peer.model.generation_config.suppress_tokens = [i for i in range(len(valid)) if not valid[i]]
    for until in ([], ["a", "\n"]):
        arguments = {"until": until, "max_gen_toks": 24, "do_sample": False}
        batch = requests("generate_until", [(context, arguments) for context in contexts])
        theirs = peer.generate_until(requests("generate_until", [(c, {**arguments}) for c in contexts]))
        assert lm.generate_until(batch) == theirs


def test_weights_and_cache_may_be_of_few_bits(lm: S1jaxLM, directory: Path) -> None:
    few = S1jaxLM(pretrained=str(directory), dtype="float32", weights="int8", cache_dtype="int8", batch_size=4)
    assert (few._loaded.model.quantisation, few._loaded.model.cache_dtype) == ("int8", "int8")
    arguments = [(text[:9], text[9:]) for text in TEXTS[:2]]
    ours, exact = (model.loglikelihood(requests("loglikelihood", arguments)) for model in (few, lm))
    for (logprob, _), (expected, _) in zip(ours, exact, strict=True):
        assert logprob != expected
        assert logprob == pytest.approx(expected, rel=0.05)
    for wrong in ({"weights": "int5"}, {"cache_dtype": "int4"}):
        with pytest.raises(ValueError, match="int"):
            S1jaxLM(pretrained=str(directory), **wrong)


@pytest.mark.parametrize(("limit", "waits", "total"), [(5, 0, 40), ("auto", 2, 80)])
def test_s1s_arguments_force_the_budget(
    lm: S1jaxLM, loaded: LoadedModel, limit: int | str, waits: int, total: int
) -> None:
    questions = [f"What is {i} + {j}?" for i in range(4) for j in range(4)]
    contexts = [lm.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    gen_kwargs = {"max_tokens_thinking": limit, "thinking_n_ignore": waits, "thinking_n_ignore_str": "12"}
    arguments = {"until": [], "max_gen_toks": total, "do_sample": True, "temperature": 1.0, **gen_kwargs}
    results = lm.generate_until(requests("generate_until", [(context, arguments) for context in contexts]))
    profile = lm._profiles[True]
    room = total - len(profile.budget_end_with_newline)
    budgets = [
        ThinkingBudget(
            max_thinking_tokens=limit,
            num_ignore=waits,
            wait="12",
            max_answer_tokens=room // 2 if limit == "auto" else room - limit,
            max_total_tokens=len(lm.tok_encode(context)) + len(profile.start) + total,
        )
        for context in contexts
    ]
    expected = generate(loaded, questions, budgets, sampling=Sampling(temperature=1.0), batch_size=16)
    assert results == [generation.answer for generation in expected]
    assert max(generation.num_waits for generation in expected) == waits


@pytest.mark.parametrize(
    ("gen_kwargs", "message"),
    [
        ({"max_tokens_thinking": 50, "max_gen_toks": 50}, "leaves no answer"),
        ({"max_gen_toks": 8, "beams": 3}, "beams"),
        ({"max_gen_toks": 8, "do_sample": True, "temperature": -1.0}, "temperature"),
        ({"max_gen_toks": 80, "thinking_n_ignore_str": "<|im_start|>"}, "holds an end token"),
    ],
)
def test_arguments_that_cannot_be_kept_are_refused(lm: S1jaxLM, gen_kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.generate_until(requests("generate_until", [("What?", {"until": [], **gen_kwargs})]))


def test_a_distilled_models_tokenizer_is_taken(directory: Path, tmp_path: Path) -> None:
    """It has none of Qwen's eos, as DeepSeek's distilled models."""
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (copy / name).read_text(encoding="utf-8").replace("<|endoftext|>", "<|pad|>")
        (copy / name).write_text(text.replace("<|im_end|>", "<｜end▁of▁sentence｜>"), encoding="utf-8")
    distilled = S1jaxLM(pretrained=str(copy), batch_size="2", profile="deepseek-r1")
    thinking = {"max_tokens_thinking": 5, "max_gen_toks": 60}
    batch = [("How many?", {"until": [], "max_gen_toks": 8}), ("How many?", {"until": [], **thinking})]
    plain, answer = distilled.generate_until(requests("generate_until", batch))
    assert plain
    assert answer is not None
    with pytest.raises(ValueError, match=re.escape("does not fit the tokenizer")):
        S1jaxLM(pretrained=str(copy), batch_size="2")


@pytest.mark.slow
def test_the_command_line_evaluates_a_task(directory: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + 3?", "answer": str(i + 3)} for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/sums.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: [], do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    )
    words = ["--model", "s1jax", "--model_args", f"pretrained={directory}", "--tasks", "sums", "--include_path"]
    words += [str(tmp_path), "--apply_chat_template", "--log_samples", "--output_path", str(tmp_path / "out")]
    words += ["--gen_kwargs", "max_gen_toks=60,max_tokens_thinking=8,thinking_n_ignore=1,thinking_n_ignore_str=Wait"]
    process = subprocess.run(
        [sys.executable, "-m", "s1jax.evaluation.harness", "run", *words, "--batch_size", "4"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "exact_match" in process.stdout
    [samples] = (tmp_path / "out").rglob("samples_sums_*.jsonl")
    assert len(samples.read_text().splitlines()) == len(rows)
    [results] = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["sums"]["exact_match,none"]
    assert 0 <= accuracy <= 1
    assert math.isfinite(accuracy)
