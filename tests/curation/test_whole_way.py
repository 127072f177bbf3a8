"""From a pool of questions to a trained model, with a small teacher and small students behind a local server."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from s1jax.curation.card import STAGES
from tests.curation.stages import Row, card, read_rows, write_rows
from tests.server import running

ROOT = Path(__file__).parents[2]
POOL, WANTED = 60, 10


def problems(count: int, first: int = 0) -> list[Row]:
    """Rows like GSM8K's, each with numbers of its own; the worked solution says little, so that it is soon learnt."""
    return [
        {"question": f"Anna has {n} apples. How many?", "answer": "We count the apples. <<1=1>>\n#### 7"}
        for n in range(first, first + count)
    ]


def run(*words: str | Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_from_a_pool_to_a_trained_model(tmp_path: Path) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", problems(POOL))
    test = write_rows(tmp_path / "test.jsonl", [{"question": "Unlike all others."}, *problems(3)])
    examples = write_rows(tmp_path / "examples.jsonl", problems(64, first=100))
    run("benchmarks/small_models.py", examples, tmp_path / "models", "64", "10", "teacher", "student-a")
    config = yaml.safe_load((ROOT / "configs/curation/gsm8k-small.yaml").read_text())
    config["sources"]["gsm8k"] |= {"path": str(pool)}
    config["evaluation_sets"] = {"test": {"path": str(test)}}
    config["output_dir"] = str(tmp_path / "run")
    config["select"] |= {"size": WANTED, "uniform_until": 7}
    config["format"] = {"validation": 2}
    config["distill"]["endpoint"] |= {"max_tokens": 64, "extra_body": {"thinking_budget": 48}}
    config["students"]["student-a"]["endpoint"] |= {"max_tokens": 16, "extra_body": {"thinking_budget": 12}}
    # A student that this process computes, and that has learnt nothing.
    budget = {"profile": "none", "max_answer_tokens": 8}
    path = str(tmp_path / "models/student-a/start")
    config["students"]["student-b"] = {"path": path, "dtype": "float32", "budget": budget}
    with ExitStack() as servers:
        for name, section in (("teacher", config["distill"]), ("student-a", config["students"]["student-a"])):
            words = [f"server.name={name}", "batch_size=32"]
            server = servers.enter_context(running(tmp_path / f"models/{name}/run/model", tmp_path / name, words))
            section["endpoint"]["base_url"] = f"{server.url}/v1"
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for stage in STAGES:
            if stage != "domains":
                run("-m", "s1jax.curate", stage, tmp_path / "config.yaml")
    output = tmp_path / "run"
    train, validation = (read_rows(output / f"{name}.jsonl") for name in ("train", "validation"))
    assert (len(train), len(validation)) == (WANTED - 2, 2)
    for row in [*train, *validation]:
        assert row["question"].startswith("Anna has")
        assert row["thinking_trajectories"][0]
        assert row["attempt"]
    entries = card(output)
    assert list(entries) == [stage for stage in STAGES if stage != "domains"]
    assert [count for _, count in entries["collect"]["funnel"]] == [POOL, POOL, POOL - 3]
    assert set(entries["attempt"]["tables"]) == {"student-a", "student-b"}
    run(
        "train.py",
        "configs/sft/demo.yaml",
        f"model.path={tmp_path}/models/student-a/start",
        f"data.path={output}/train.jsonl",
        f"data.eval_path={output}/validation.jsonl",
        f"training.output_dir={tmp_path}/sft",
    )
    metrics = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert metrics
    assert (tmp_path / "sft" / "model" / "model.safetensors").exists()
