"""decode.py generate and benchmark from the command line, and generation from Python."""

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from s1jax import Sampling, ThinkingBudget, generate
from s1jax.config import BenchmarkConfig
from s1jax.config_reader import ConfigError, load_config
from s1jax.decoding.benchmark import benchmark as measure
from s1jax.model.load import LoadedModel
from tests.decoding.conftest import CONFIG, ROOT, command, environment, run
from tests.tiny import model_directory

QUESTIONS = ["What is 3 + 4?", "How many apples does she have?", "So 12 * 5 = ?"]


def results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_python_and_the_command_line_give_the_same(directory: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    budgets = [
        ThinkingBudget(5, num_ignore=2, max_answer_tokens=8, max_total_tokens=150),
        ThinkingBudget(0, max_answer_tokens=3, max_total_tokens=150),
        ThinkingBudget(30, 20, num_ignore=2, wait=("Wait", "Let me"), max_answer_tokens=8, max_total_tokens=150),
    ]
    rows = [
        {"prompt": QUESTIONS[0], "max_thinking_tokens": 5, "num_ignore": 2},
        {"messages": [{"role": "user", "content": QUESTIONS[1]}], "max_thinking_tokens": 0, "max_answer_tokens": 3},
        {"id": "third", "prompt": QUESTIONS[2], "max_thinking_tokens": 30, "min_thinking_tokens": 20},
    ]
    rows[2] |= {"num_ignore": 2, "wait": ["Wait", "Let me"]}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = run(directory, f"prompts={prompts}", f"output={output}", "logprobs=true")
    assert process.returncode == 0, process.stderr
    from_python = generate(loaded, QUESTIONS, budgets, logprobs=True)
    by_id = {row["id"]: row for row in results(output)}
    assert sorted(by_id, key=str) == [0, 1, "third"]
    for row, key, budget, expected in zip(rows, [0, 1, "third"], budgets, from_python, strict=True):
        line = by_id[key]
        assert line.pop("logprobs") == pytest.approx(expected.logprobs, abs=1e-4)
        assert line == {
            "id": key,
            "prompt": row.get("prompt", row.get("messages")),
            "budget": json.loads(json.dumps(asdict(budget))),
            **{name: value for name, value in asdict(expected).items() if name != "logprobs"},
        }
    assert by_id[1]["answer"].startswith("\nFinal Answer:")
    with pytest.raises(ValueError, match="3 prompts, but 1 budgets"):
        generate(loaded, QUESTIONS, budgets[:1])
    with pytest.raises(ValueError, match="prompt 1: no room to answer"):
        generate(loaded, QUESTIONS, [budgets[0], ThinkingBudget(1, max_answer_tokens=200), budgets[0]])


@pytest.mark.slow
def test_samples_of_a_prompt_differ_and_are_numbered(directory: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = ["sampling.temperature=1", "sampling.num_samples=3", "sampling.seed=4", "budget.max_thinking_tokens=12"]
    process = run(directory, f"prompt={QUESTIONS[0]}", f"output={output}", *words)
    assert process.returncode == 0, process.stderr
    rows = sorted(results(output), key=lambda row: row["sample"])
    assert [row["sample"] for row in rows] == [0, 1, 2]
    assert len({tuple(row["output_ids"]) for row in rows}) == 3
    budget = ThinkingBudget(12, max_answer_tokens=8, max_total_tokens=150)
    first = generate(loaded, QUESTIONS[:1], budget, sampling=Sampling(temperature=1.0), seed=4)[0]
    assert rows[0]["output_ids"] == first.output_ids


@pytest.mark.slow
def test_on_a_terminal_forced_tokens_have_another_colour(directory: Path, tmp_path: Path) -> None:
    words = [f"prompt={QUESTIONS[0]}", "budget.max_thinking_tokens=6", "budget.num_ignore=1"]
    host, terminal = pty.openpty()
    process = subprocess.Popen(
        command(directory, *words), cwd=ROOT, env=environment(), stdout=terminal, stderr=subprocess.DEVNULL
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(host, 4096)
        except OSError:  # How Linux says that the other side has closed.
            break
        if not part:
            break
        shown += part
    os.close(host)
    assert process.wait() == 0
    text = shown.decode().replace("\r\n", "\n")
    output = tmp_path / "out.jsonl"
    assert run(directory, *words, f"output={output}").returncode == 0
    (row,) = results(output)
    plain = re.sub("\x1b\\[[0-9]+m", "", text)
    assert plain.startswith(row["text"])
    assert f"[{row['num_thinking_tokens']} thinking tokens" in plain
    coloured = "".join(re.findall("\x1b\\[33m(.*?)\x1b\\[0m", text, flags=re.DOTALL))
    assert coloured.endswith("<|im_start|>answer\nFinal Answer:")
    assert row["text"].count("Final Answer:") == 1
    piped = run(directory, *words)
    assert piped.stdout == plain


def test_what_does_not_fit_the_model_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    other = run(directory, "prompt=a", "budget.profile=deepseek-r1")
    assert other.returncode == 1
    assert "delimiter profile 'deepseek-r1' does not fit the tokenizer" in other.stderr
    assert "<｜end▁of▁sentence｜>" in other.stderr
    absent = run(directory, "prompt=a", "budget.profile=s2")
    assert absent.returncode == 1
    assert "no delimiter profile 's2'" in absent.stderr
    small = model_directory(tmp_path / "small", {**CONFIG, "vocab_size": 360})
    wrong = run(small, "prompt=a")
    assert wrong.returncode == 1
    assert f"the tokenizer of {small} has ids up to 367, the model's vocabulary only 360" in wrong.stderr
    negative = run(directory, "prompt=a", "budget.num_ignore=-1", "budget.max_thinking_token=3")
    assert negative.returncode == 2
    assert "budget.num_ignore" in negative.stderr
    assert "did you mean budget.max_thinking_tokens?" in negative.stderr


@pytest.mark.slow
def test_out_of_memory_says_what_was_tried_and_what_to_lower(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", {**CONFIG, "max_position_embeddings": 2**19})
    words = ["batch_size=1000", "cache.tokens=500000000", "max_total_tokens=500000", "prompt=long"]
    # However freely the system hands out memory, this process gets no more than 32 GiB of addresses.
    limited = ["sh", "-c", 'ulimit -v 33554432; exec "$@"', "sh", *command(directory, *words)]
    process = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert process.returncode == 1, process.stderr
    said = "out of device memory with 1000 rows of up to 524288 tokens in 3 layers: lower cache.tokens"
    assert said in process.stderr, process.stderr


def test_a_prompt_that_the_cache_has_no_room_for_is_named_before_anything_is_decoded(
    directory: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    failed = run(directory, "prompt=a", f"output={output}", "cache.tokens=128")
    assert failed.returncode == 1
    assert re.fullmatch(
        r"error: 1 of 1 prompts cannot be run:\n"
        r"  prompt 0: may need \d+ tokens, and cache\.tokens is 128: lower max_total_tokens or the budget\n",
        failed.stderr,
    )
    assert not output.exists()
    longer = run(directory, "prompt=" + "3 + 4 is 7. " * 6, "budget.max_thinking_tokens=1", "cache.tokens=128")
    assert "and cache.tokens is 128" in longer.stderr
    fits = run(directory, "prompt=a", "budget.max_thinking_tokens=4", "budget.max_answer_tokens=4", "cache.tokens=128")
    assert fits.returncode == 0, fits.stderr


def benchmark(directory: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The report on a model of which only the configuration is there, and what is printed."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    output = directory / "speed.json"
    process = subprocess.run(
        [sys.executable, "decode.py", "benchmark", f"model.path={directory}", f"benchmark.output={output}", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(output.read_text()), process.stdout


@pytest.mark.slow
def test_the_benchmark_needs_no_more_than_a_config(tmp_path: Path) -> None:
    words = ["benchmark.batch_sizes=1,4", "benchmark.prompt_length=16", "benchmark.new_tokens=40"]
    report, printed = benchmark(tmp_path, *words)
    assert report["weights"] == "random"
    assert [row["batch_size"] for row in report["results"]] == [1, 4]
    for row in report["results"]:
        assert all(value > 0 for name, value in row.items() if name != "compile_seconds"), row
        assert row["decode_tokens_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["milliseconds_per_step"])
    assert "ms/step" in printed


def test_the_benchmark_refuses_an_adapter_of_random_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = load_config(BenchmarkConfig, [f"model.path={tmp_path}", "model.adapter=nowhere"])
    with pytest.raises(ConfigError, match=r"^model\.adapter: .* has no weights that it could be merged into"):
        measure(config)


@pytest.mark.slow
def test_the_benchmark_serves_requests_of_many_lengths_that_come_over_time(tmp_path: Path) -> None:
    words = ["benchmark.batch_sizes=2,8", "benchmark.prompt_length=16", "benchmark.new_tokens=40"]
    words += ["benchmark.repeats=1", "benchmark.requests=24", "benchmark.lengths=lognormal:40:90", "benchmark.rate=200"]
    report, _ = benchmark(tmp_path, *words)
    two, eight = report["workloads"]
    for workload, rows in ((two, 2), (eight, 8)):
        assert (workload["batch_size"], workload["requests"]) == (rows, 24)
        assert workload["prompt_tokens"] == 24 * 16
        assert 24 * 20 < workload["output_tokens"] < 24 * 60
        assert workload["tokens_per_second"] == pytest.approx(workload["output_tokens"] / workload["seconds"])
        for percentiles in (workload["first_token_seconds"], workload["seconds_per_token"]):
            assert 0 < percentiles["p50"] <= percentiles["p90"] <= percentiles["p99"] < workload["seconds"]
        assert max(moment["rows"] for moment in workload["moments"]) <= rows
        assert all(moment["live_tokens"] <= moment["rows"] * (16 + 90) for moment in workload["moments"])
        assert workload["moments"][-1]["seconds"] == workload["seconds"]
    assert two["output_tokens"] == eight["output_tokens"]
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
