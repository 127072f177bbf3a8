"""Runs on buckets that are killed again and again: python -m tests.kills train|generate gs|s3 KILLS [SEED].

The same command is started, killed (SIGKILL) at a random moment, and started again; at last it may finish. Its end must
be that of a run that nothing happened to: nothing lost, nothing doubled, the same bytes.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s1jax.paths import AnyPath, any_path
from tests.buckets import BUCKET, gcs_server, s3_server
from tests.tiny import QWEN2, model_directory

ROOT = Path(__file__).parents[1]
_CLOCK = ("seconds", "tokens_per_second", "mfu")


def training_words(model: Path, data: Path, output: str, steps: int) -> list[str]:
    settings = [
        "data.block_size=256",
        "training.num_epochs=1000",
        "training.batch_size=2",
        f"training.max_steps={steps}",
    ]
    settings += [
        "checkpoint.every_steps=2",
        "checkpoint.keep=2",
        "training.export_dtype=float32",
        "model.dtype=float32",
    ]
    return ["train.py", f"model.path={model}", f"data.path={data}", f"training.output_dir={output}", *settings]


def generating_words(model: Path, prompts: Path, output: str) -> list[str]:
    settings = ["model.dtype=float32", "budget.max_thinking_tokens=24", "budget.max_answer_tokens=8", "batch_size=4"]
    settings += ["sampling.temperature=0.7"]
    return ["decode.py", "generate", f"model.path={model}", f"prompts={prompts}", f"output={output}", *settings]


def kill_and_resume(words: list[str], kills: int, draw: random.Random, lifetime: float) -> int:
    """Start the command until it has been killed so often, then let it end; returns the kills that hit it alive.

    A run that ends before its time came counts as no kill; the caller gives it enough to do.
    """
    done = 0
    while done < kills:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=draw.uniform(0.3, 1) * lifetime)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            done += 1
            continue
        assert process.returncode == 0, output.decode()
        break
    result = subprocess.run(
        [sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert result.returncode == 0, result.stdout
    return done


def undisturbed(words: list[str]) -> float:
    """Run the command; returns how long it took."""
    started = time.monotonic()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def rows_of(path: AnyPath) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in _CLOCK} for row in rows]


@contextmanager
def served(scheme: str, directory: Path) -> Iterator[None]:
    """The store's server, and this process's environment such that it is found."""
    with gcs_server(directory) if scheme == "gs" else s3_server() as settings:
        os.environ.update(settings)
        yield


def train(scheme: str, kills: int, draw: random.Random, directory: Path, steps: int) -> int:
    model = model_directory(directory / "model")
    data = directory / "traces.jsonl"
    rows = [{"question": f"{i} + 3?", "thinking_trajectories": [f"I add {i}. "], "attempt": str(i)} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    alone, killed = directory / "alone", f"{scheme}://{BUCKET}/run"
    undisturbed(training_words(model, data, str(alone), steps))
    lifetime = undisturbed(training_words(model, data, f"{scheme}://{BUCKET}/first", 8))
    done = kill_and_resume(training_words(model, data, killed, steps), kills, draw, lifetime)
    weights = "model/model.safetensors"
    assert rows_of(any_path(killed) / "metrics.jsonl") == rows_of(alone / "metrics.jsonl")
    assert (any_path(killed) / weights).read_bytes() == (alone / weights).read_bytes()
    return done


def generate(scheme: str, kills: int, draw: random.Random, directory: Path, prompts: int) -> int:
    model = model_directory(directory / "model", {**QWEN2, "max_position_embeddings": 160}, seed=3)
    path = directory / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": f"What is {i}?"}) + "\n" for i in range(prompts)))
    alone, killed = directory / "alone.jsonl", f"{scheme}://{BUCKET}/killed.jsonl"
    lifetime = undisturbed(generating_words(model, path, str(alone)))
    done = kill_and_resume(generating_words(model, path, killed), kills, draw, min(lifetime, 12))
    ours, expected = rows_of(any_path(killed)), rows_of(alone)
    assert [row["id"] for row in ours] == list(dict.fromkeys(row["id"] for row in ours))
    assert sorted(ours, key=lambda row: row["id"]) == sorted(expected, key=lambda row: row["id"])
    return done


MODES = {"train": train, "generate": generate}


def main(mode: str, scheme: str, kills: str, seed: str = "0") -> None:
    """Kill as often as asked, and say what came of it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, served(scheme, Path(name) / "objects"):
        work = 3 * int(kills) if mode == "train" else 6 * int(kills)
        done = MODES[mode](scheme, int(kills), random.Random(int(seed)), Path(name), work)
    print(f"{mode} on {scheme}://: {done} kills, nothing lost or doubled, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
