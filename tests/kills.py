"""Runs on buckets that are killed again and again: python -m tests.kills train|generate gs|s3 KILLS [SEED].

The same command is started, killed (SIGKILL) at a random moment, and started again, until it ends by itself. Its end
must be that of a run that nothing happened to: nothing lost, nothing doubled, the same bytes.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s1jax.paths import AnyPath, any_path
from tests.buckets import BUCKET, gcs_server, s3_server
from tests.tiny import QWEN2, model_directory

ROOT = Path(__file__).parents[1]
_CLOCK = ("seconds", "tokens_per_second", "mfu")


def kill_and_resume(words: list[str], kills: int, draw: random.Random, lifetime: float) -> int:
    """Start the command until it ends by itself, killing it at most so often; returns how often it was killed."""
    killed = 0
    while True:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=draw.uniform(0.2, 1) * lifetime if killed < kills else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
        else:
            assert process.returncode == 0, output.decode()
            return killed


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


def train(output: str, model: Path, directory: Path) -> list[str]:
    """The command of a training run."""
    data = directory / "traces.jsonl"
    rows = [{"question": f"{i} + 3?", "thinking_trajectories": [f"I add {i}. "], "attempt": str(i)} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["data.block_size=256", "training.num_epochs=5", "training.batch_size=2", "model.dtype=float32"]
    settings += ["checkpoint.every_steps=2", "checkpoint.keep=2", "training.export_dtype=float32"]
    return ["train.py", f"model.path={model}", f"data.path={data}", f"training.output_dir={output}", *settings]


def generate(output: str, model: Path, directory: Path) -> list[str]:
    """The command of a generation of many short answers."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": i, "prompt": f"What is {i}?"}) + "\n" for i in range(64)))
    settings = ["model.dtype=float32", "budget.max_thinking_tokens=24", "budget.max_answer_tokens=8", "batch_size=2"]
    settings += ["sampling.temperature=0.7"]
    return ["decode.py", "generate", f"model.path={model}", f"prompts={prompts}", f"output={output}", *settings]


def check_training(killed: AnyPath, alone: AnyPath) -> None:
    """Raise AssertionError unless both runs ended with the same bytes and the same metrics."""
    weights = "model/model.safetensors"
    assert rows_of(killed / "metrics.jsonl") == rows_of(alone / "metrics.jsonl")
    assert (killed / weights).read_bytes() == (alone / weights).read_bytes()


def check_generation(killed: AnyPath, alone: AnyPath) -> None:
    """Raise AssertionError unless each prompt has one answer, the same in both."""
    ours, expected = (sorted(rows_of(path), key=lambda row: row["id"]) for path in (killed, alone))
    assert [row["id"] for row in ours] == list(range(64))
    assert ours == expected


MODES: dict[str, tuple[Callable[[str, Path, Path], list[str]], Callable[[AnyPath, AnyPath], None], str]] = {
    "train": (train, check_training, ""),
    "generate": (generate, check_generation, ".jsonl"),
}
"""Of each mode its command, what its end is held to, and the ending of its output's name."""


def main(mode: str, scheme: str, kills: str, seed: str = "0") -> None:
    """Kill as often as asked, in as many runs as that takes, and say what came of it."""
    command, check, ending = MODES[mode]
    draw, started, done, runs = random.Random(int(seed)), time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as name, served(scheme, Path(name) / "objects"):
        directory = Path(name)
        model = model_directory(directory / "model", {**QWEN2, "max_position_embeddings": 256}, seed=3)
        alone = directory / f"alone{ending}"
        undisturbed(command(str(alone), model, directory))
        lifetime = undisturbed(command(f"{scheme}://{BUCKET}/first{ending}", model, directory))
        while done < int(kills):
            output = f"{scheme}://{BUCKET}/run-{runs}{ending}"
            done += kill_and_resume(command(output, model, directory), int(kills) - done, draw, lifetime)
            check(any_path(output), alone)
            runs += 1
    seconds = time.monotonic() - started
    print(f"{mode} on {scheme}://: {done} kills in {runs} runs, nothing lost or doubled, {seconds:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
