"""Scoring as a person runs it: right numbers, in order, stopped and started without losing a line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s1jax.config import DecodingMeshSection, ModelSection
from s1jax.decoding.score import score_rows
from s1jax.model.load import load_model
from tests.processes import wait_until
from tests.small_disk import small_disk
from tests.tiny import QWEN2, model_directory

ROOT = Path(__file__).parents[2]
WIDE = {**QWEN2, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("score") / "model", WIDE)


def command(directory: Path, source: Path, target: Path, *words: str) -> list[str]:
    settings = [f"model.path={directory}", f"input={source}", f"output={target}", "model.dtype=float32", *words]
    return [sys.executable, "decode.py", "score", "mesh.fsdp=1", *settings]


def run(*args, **kwargs) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(
        command(*args, **kwargs), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def rows_of(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 368, rng.integers(1, 120)).tolist() for _ in range(count)]


def test_scores_are_the_plain_computation_on_any_mesh_and_batch(directory: Path) -> None:
    section, rows = ModelSection(path=str(directory), dtype="float32"), rows_of(6)
    loaded = load_model(section, DecodingMeshSection(fsdp=8, tensor=2))
    results = score_rows(loaded, rows, batch_size=4)
    alone = [score_rows(loaded, [row], batch_size=1)[0] for row in rows]
    for row, result, other in zip(rows, results, alone, strict=True):
        padded = jnp.asarray([row + [0] * (128 - len(row))])
        hidden, _ = loaded.model.hidden_states(loaded.params, padded, jnp.arange(128)[None])
        logprobs = jax.nn.log_softmax(loaded.model.logits(loaded.params, hidden)[0], axis=-1)
        expected = [float(logprobs[i, row[i + 1]]) for i in range(len(row) - 1)]
        assert result["input_ids"] == row
        assert result["logprobs"][0] is None
        assert result["greedy"][0] is None
        np.testing.assert_allclose(result["logprobs"][1:], expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(other["logprobs"][1:], result["logprobs"][1:], rtol=0, atol=1e-4)
        assert result["greedy"][1:] == [int(logprobs[i].argmax()) == row[i + 1] for i in range(len(row) - 1)]
        assert result["nll"] == pytest.approx(-sum(result["logprobs"][1:]), abs=1e-3)


def test_every_bad_row_is_listed_before_anything_is_computed(directory: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = ["{", '{"text": ""}', '{"input_ids": [1, 99999]}', '{"words": "x"}', '{"text": "fine"}', "[1]"]
    source.write_text("\n".join([*lines, json.dumps({"input_ids": [1] * 600})]))
    result = run(directory, source, target)
    assert result.returncode == 1
    for part in (
        "line 1: not JSON",
        "line 2: empty",
        "line 3: ids run from 1 to 99999, vocabulary 384",
        "line 4: expected text",
        "line 6: expected an object",
        "line 7: 600 tokens, at most 512 fit",
    ):
        assert part in result.stderr
    assert not target.exists()


@pytest.mark.slow
def test_killed_and_started_again_every_line_is_there_once(directory: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{"id": f"row {i}", "input_ids": ids} for i, ids in enumerate(rows_of(400))]
    rows[3] = {"id": "text", "text": "Wait, 3 and 4 is 7."}
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    undisturbed, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run(directory, source, undisturbed, "batch_size=1").returncode == 0
    process = subprocess.Popen(
        command(directory, source, target, "batch_size=1"), cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}
    )
    while not target.exists() or target.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with target.open("a") as file:
        file.write('{"id": "row 39')  # As if the kill had come in the middle of a line.
    assert len(target.read_text().splitlines()) < 400
    assert run(directory, source, target, "batch_size=1").returncode == 0
    assert target.read_bytes() == undisturbed.read_bytes()
    assert [json.loads(line)["id"] for line in target.read_text().splitlines()] == [row["id"] for row in rows]


@pytest.mark.slow
def test_a_full_disk_is_named_once_and_what_is_written_is_intact(directory: Path, tmp_path: Path) -> None:
    source, rows = tmp_path / "in.jsonl", rows_of(200)
    source.write_text("".join(json.dumps({"id": i, "input_ids": ids}) + "\n" for i, ids in enumerate(rows)))
    undisturbed = tmp_path / "whole.jsonl"
    assert run(directory, source, undisturbed, "batch_size=2").returncode == 0
    with small_disk(tmp_path / "disk", "300k") as disk:
        target = disk / "out.jsonl"
        full = run(directory, source, target, "batch_size=2")
        assert full.returncode == 1
        said = [line for line in full.stderr.splitlines() if "No space left" in line]
        assert said == [f"error: {target}: No space left on device; the lines before are intact"]
        whole = target.read_bytes()
        assert whole.endswith(b"\n")
        assert undisturbed.read_bytes().startswith(whole)
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        assert run(directory, source, target, "batch_size=2").returncode == 0
        assert target.read_bytes() == undisturbed.read_bytes()


@pytest.mark.slow
def test_two_at_once_do_not_write_twice(directory: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows_of(400)))
    first = subprocess.Popen(
        command(directory, source, target, "batch_size=1"), cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}
    )
    wait_until(target.exists, [first])
    first.send_signal(signal.SIGSTOP)  # It lives, but will not be done before the second has looked.
    second = run(directory, source, target)
    assert second.returncode == 1
    (said,) = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: {target}: another run is writing here")
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=300) == 0
    assert [json.loads(line)["id"] for line in target.read_bytes().splitlines()] == list(range(400))


def test_ids_that_are_there_twice_are_refused(directory: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": "b", "id": 0}\n')
    result = run(directory, source, tmp_path / "out.jsonl")
    assert result.returncode == 1
    assert "line 2: id 0 is that of line 1 too" in result.stderr


def test_another_runs_output_is_refused_and_an_empty_input_gives_an_empty_output(
    directory: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("")
    assert run(directory, source, target).returncode == 0
    assert target.read_text() == ""
    target.write_text('{"id": "other"}\n')
    result = run(directory, source, target)
    assert result.returncode == 1
    assert "it has id 'other', which is not that row" in result.stderr
    assert target.read_text() == '{"id": "other"}\n'
