"""Weights that are all finite, and scores that are not: the run ends, and says in which row and from which layer on."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from s1jax import ThinkingBudget, generate, load
from s1jax.config import ModelSection
from s1jax.decoding.engine import Engine
from s1jax.decoding.finite import NonFiniteError
from s1jax.decoding.profiles import prepare_prompt
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished
from s1jax.decoding.score import score_rows
from tests.decoding.conftest import run
from tests.decoding.test_generate import profile_ids
from tests.decoding.test_score import run as run_score
from tests.tiny import QWEN2, model_directory

MARK = 300
"""The token whose rows overflow."""


def model_with(tmp_path: Path, scaled: dict[str, float]) -> Path:
    directory = model_directory(tmp_path / "model", QWEN2)
    weights = load_file(directory / "model.safetensors")
    for name, factor in scaled.items():
        weights[name] = weights[name] * np.float32(factor)
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.0.self_attn.v_proj.weight", "layer 0"),
        ("model.layers.1.mlp.down_proj.weight", "layer 1"),
        ("model.norm.weight", "the output head"),
    ],
)
def test_the_first_place_is_named(name: str, place: str, tmp_path: Path) -> None:
    loaded = load(ModelSection(path=str(model_with(tmp_path, {name: 2e38})), dtype="float32"))
    expected = f"are NaN or infinite, computed in float32; such numbers come first in {place}$"
    with pytest.raises(NonFiniteError, match=r"prompt 0, sample 0, after 3 tokens: scores " + expected):
        generate(loaded, [[5, 6, 7]], ThinkingBudget(max_thinking_tokens=4), profile="none")
    with pytest.raises(NonFiniteError, match=r"row 0: scores " + expected):
        score_rows(loaded, [[5, 6, 7]], batch_size=1)


def test_the_row_is_named_and_the_token(tmp_path: Path) -> None:
    """Attention adds almost the greatest number to every token, and one token's embedding is as great."""
    directory = model_with(tmp_path, {})
    weights = load_file(directory / "model.safetensors")
    layer = "model.layers.0.self_attn"
    weights[f"{layer}.v_proj.weight"][:], weights[f"{layer}.v_proj.bias"][:] = 0, 1
    weights[f"{layer}.o_proj.weight"][0] = 2e38 / weights[f"{layer}.o_proj.weight"].shape[1]
    weights["model.embed_tokens.weight"][MARK, 0] = 2e38
    save_file(weights, directory / "model.safetensors")
    loaded = load(ModelSection(path=str(directory), dtype="float32"))
    good, bad = [5, 6, 7], [5, 6, MARK, 7, 8]
    (done,) = generate(loaded, [good], ThinkingBudget(max_answer_tokens=4), profile="none")
    assert MARK not in done.output_ids
    assert len(score_rows(loaded, [good, good], batch_size=2)) == 2
    with pytest.raises(NonFiniteError, match=r"prompt 1, sample 0, after 5 tokens: .* come first in layer 0$"):
        generate(loaded, [good, bad], ThinkingBudget(max_answer_tokens=4), profile="none")
    # Those beside it are reported first.
    engine = Engine(loaded, loaded.tokenizer, profile_ids(loaded, "none"))
    budget = ThinkingBudget(max_answer_tokens=4)
    for index, prompt in enumerate((bad, good)):
        engine.submit(Request(prepare_prompt(prompt, profile_ids(loaded, "none")), budget, index))
    finished = [event for event in engine.step() if isinstance(event, Finished)]
    assert [(event.request.index, event.generation) for event in finished] == [(1, done)]
    with pytest.raises(NonFiniteError, match=r"prompt 0, sample 0"):
        engine.step()
    with pytest.raises(NonFiniteError, match=r"row 1: .* come first in layer 0$"):
        score_rows(loaded, [good, bad], batch_size=2)


def test_commands_say_it_in_one_line(tmp_path: Path) -> None:
    directory = model_with(tmp_path, {"model.layers.1.mlp.down_proj.weight": 3e38})
    generated = run(directory, "prompt=x", "budget.profile=none", f"output={tmp_path}/out.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "input_ids": [5, 6]}) + "\n")
    scored = run_score(directory, tmp_path / "rows.jsonl", tmp_path / "scores.jsonl")
    for process, text in ((generated, "prompt 0, sample 0"), (scored, "rows.jsonl: id 'a'")):
        assert process.returncode == 1
        (line,) = [line for line in process.stderr.splitlines() if line.startswith("error")]
        assert text in line
        assert line.endswith("such numbers come first in layer 1")
        assert "Traceback" not in process.stderr
