"""A result belongs to one question, one model and one setting: going on with those of another is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from s1jax.config import EvaluateConfig, GenerateConfig, ScoreConfig
from s1jax.config_reader import load_config
from s1jax.decoding.cli import generate
from s1jax.decoding.score import score
from s1jax.evaluation.evaluate import evaluate
from s1jax.jsonl import InputError
from s1jax.model.fingerprint import fingerprint
from tests.tiny import QWEN2, model_directory

MODEL = {**QWEN2, "max_position_embeddings": 128}
WORDS = ["model.dtype=float32", "mesh.data=16", "mesh.fsdp=1", "mesh.tensor=1"]
Edit = Callable[[Path], None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "model", MODEL)


def weight(directory: Path) -> None:
    weights = load_file(directory / "model/model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] += np.float32(0.5)
    save_file(weights, directory / "model/model.safetensors")


def template(directory: Path) -> None:
    path = directory / "model/chat_template.jinja"
    path.write_text(path.read_text() + " ")


def edited(name: str, old: str, new: str) -> Edit:
    def edit(directory: Path) -> None:
        text = (directory / name).read_text()
        assert text.count(old) == 1
        (directory / name).write_text(text.replace(old, new))

    return edit


def nothing(directory: Path) -> None:
    """Only the words of the command differ."""


def run(
    command: Callable, config: type, words: list[str], changed: tuple[Edit, list[str], str], directory: Path
) -> None:
    """Run the command; change something; it must be refused with this message, and its output left as it was."""
    edit, more, message = changed
    command(load_config(config, words))
    written = [directory / "out.jsonl", directory / "out/samples.jsonl", directory / "out/summary.json"]
    files = {path: path.read_bytes() for path in written if path.exists()}
    assert files
    edit(directory)
    with pytest.raises(InputError, match=message):
        command(load_config(config, [*words, *more]))
    assert all(path.read_bytes() == content for path, content in files.items())


@pytest.mark.parametrize(
    "changed",
    [
        (weight, [], "other values of the model's model.safetensors: move it away"),
        (template, [], r"other values of the model's chat_template.jinja: move it away"),
        (edited("prompts.jsonl", "Is it 1", "Is it 7"), [], "id 'b', whose prompt or budget is not that one here"),
        (edited("prompts.jsonl", '"num_ignore": 1', '"num_ignore": 0'), [], "id 'a', whose prompt or budget is not"),
        (edited("prompts.jsonl", '"id": "a"', '"id": "c"'), [], "id 'a', whose prompt or budget is not that one"),
        (nothing, ["sampling.seed=1"], "other values of sampling: move it away"),
        (nothing, ["budget.max_answer_tokens=5"], "other values of budget: move it away"),
    ],
)
def test_generate(changed: tuple[Edit, list[str], str], model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "a", "prompt": "Is it 0?", "num_ignore": 1}, {"id": "b", "prompt": "Is it 1?"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    budget = ["budget.max_thinking_tokens=4", "budget.max_answer_tokens=4"]
    words = [*WORDS, *budget, f"model.path={model}", f"prompts={prompts}", f"output={tmp_path / 'out.jsonl'}"]
    run(generate, GenerateConfig, words, changed, tmp_path)


def test_generate_takes_further_prompts(model: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    words = [*WORDS, "budget.max_thinking_tokens=4", "budget.max_answer_tokens=4", f"model.path={model}"]
    words += [f"prompts={prompts}", f"output={output}"]
    prompts.write_text('{"id": "a", "prompt": "Is it 0?"}\n')
    generate(load_config(GenerateConfig, words))
    first = output.read_text()
    prompts.write_text(prompts.read_text() + '{"id": "b", "prompt": "Is it 1?"}\n')
    generate(load_config(GenerateConfig, [*words, "batch_size=1"]))
    assert output.read_text().startswith(first)
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    "changed",
    [
        (weight, [], "other values of the model's model.safetensors: move it away"),
        (edited("rows.jsonl", "[5, 6, 7]", "[5, 6, 8]"), [], "id 'b', which is not that row of .*rows.jsonl"),
        (nothing, ["model.dtype=bfloat16"], "other values of model: move it away"),
    ],
)
def test_score(changed: tuple[Edit, list[str], str], model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "text": "It is 1."}\n{"id": "b", "input_ids": [5, 6, 7]}\n')
    words = [*WORDS, f"model.path={model}", f"input={rows}", f"output={tmp_path / 'out.jsonl'}"]
    run(score, ScoreConfig, words, changed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        (weight, [], "other values of the model's model.safetensors: move it away"),
        (edited("sums.jsonl", '"answer": "4"', '"answer": "5"'), [], "sums 1, whose text or reference is not that one"),
        (edited("sums.jsonl", "What is 1", "What is  1"), [], "sums 1, whose text or reference is not that one here"),
        (edited("sums.jsonl", '"id": "1"', '"id": "2"'), [], "sums 1, whose text or reference is not that one here"),
        (nothing, ["sweep.num_ignore=1"], "other values of sweep: move it away"),
    ],
)
def test_evaluate(changed: tuple[Edit, list[str], str], model: Path, tmp_path: Path) -> None:
    task = tmp_path / "sums.jsonl"
    rows = [{"id": str(i), "problem": f"What is {i} + 3?", "answer": str(i + 3)} for i in range(2)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    budget = ["budget.max_thinking_tokens=4", "budget.max_answer_tokens=4"]
    words = [*WORDS, *budget, f"model.path={model}", f"tasks={task}", f"output_dir={tmp_path / 'out'}"]
    run(evaluate, EvaluateConfig, words, changed, tmp_path)


def test_a_byte_anywhere_in_a_small_file_and_a_piece_of_a_large_one_are_seen(model: Path, tmp_path: Path) -> None:
    before = fingerprint(model)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= before.keys()
    assert fingerprint(Path(shutil.copytree(model, tmp_path / "copy"))) == before
    large = tmp_path / "copy/model-2.safetensors"
    with large.open("wb") as file:
        file.truncate(2**30)
    seen = [fingerprint(tmp_path / "copy")[large.name]]
    for place in (0, 2**29, 2**30 - 4096):
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"\1" * 2**20 if place < 2**30 - 4096 else b"\1")
        seen.append(fingerprint(tmp_path / "copy")[large.name])
    assert len(set(seen)) == 4
