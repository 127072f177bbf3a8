"""python -m s1jax.demo OUTPUT [SEED]: s1 in miniature, from making the data to the picture of test-time scaling.

A small Qwen2 model is trained from scratch on traces of many-step sums with train.py, then answers a held-out set under
thinking budgets and with forced waits with decode.py, the two programs that train and decode the 32B model.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from s1jax.demo.problems import write_data
from s1jax.demo.tokenizer import SYSTEM, build_tokenizer
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_model
from s1jax.model.qwen import Qwen

NUM_TRAIN, NUM_TEST = 12_000, 300
_TOKENIZER_ROWS = 2_000
_CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 768,
    "rope_theta": 1000.0,
    "tie_word_embeddings": True,
    # With the usual 0.02 a model this narrow does not begin to learn.
    "initializer_range": 0.1,
}
_INTERVAL = ("value", "low", "high")
_ROOT = Path(__file__).parents[2]


def main(output: Path, seed: int = 0) -> None:
    """Make the data, train, evaluate, and print what came out."""
    # What is done in this process is small, and a GPU's memory is for the programs that it starts.
    jax.config.update("jax_platforms", "cpu")
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    train, test = write_data(output, seed=seed, num_train=NUM_TRAIN, num_test=NUM_TEST)
    if not (output / "start").exists():
        write_untrained_model(output, train, seed)
    _run(
        "train.py",
        f"{_ROOT}/configs/sft/demo.yaml",
        f"model.path={output}/start",
        f"data.path={train}",
        f"training.output_dir={output}/run",
        f"training.seed={seed}",
    )
    trained = time.monotonic()
    _run(
        "decode.py",
        "evaluate",
        f"{_ROOT}/configs/eval/demo.yaml",
        f"model.path={output}/run/model",
        f"tasks={test}",
        f"output_dir={output}/evaluation",
        f"sampling.seed={seed}",
    )
    summary = json.loads((output / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    print(table(summary["tasks"]["test"]))
    print(
        f"This is a miniature: a model of {_num_parameters(output / 'start'):,} parameters on synthetic sums, with a "
        "teacher whose answers are not all right. It shows how budgets and waits work, not how well a language model "
        "reasons."
    )
    print(
        f"training {trained - started:.0f} s, evaluation {time.monotonic() - trained:.0f} s; "
        f"open {output / 'evaluation' / 'report.html'}"
    )


def table(figures: dict[str, Any]) -> str:
    """Accuracy of each run, and the metrics of the two ways to control the thinking."""
    lines = ["run             accuracy (95% interval)    thinking tokens"]
    for name, run in figures["runs"].items():
        value, low, high = (100 * run["accuracy"][key] for key in _INTERVAL)
        lines.append(f"{name:<14}  {value:5.1f}%  ({low:5.1f} to {high:5.1f})  {run['thinking_tokens']:14.1f}")
    budget, wait = figures["methods"]["budget"], figures["methods"]["wait"]
    # Where every run thought as long there is no scaling to speak of.
    scaling = ["–" if budget["scaling"][key] is None else f"{budget['scaling'][key]:.1f}" for key in _INTERVAL]
    lines.append(
        f"budgets: control {100 * budget['control']:.0f}%, scaling {scaling[0]} points per doubling "
        f"({scaling[1]} to {scaling[2]}), performance {100 * budget['performance']:.1f}%"
    )
    for name, gain in wait["gains"].items():
        value, low, high = (100 * gain[key] for key in _INTERVAL)
        lines.append(f"{name}: {value:+.1f} points over no wait ({low:+.1f} to {high:+.1f})")
    return "\n".join(lines)


def write_untrained_model(output: Path, train: Path, seed: int) -> None:
    """Write output/start: a tokenizer made from the s1K rows in the file `train`, and random weights."""
    with train.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(_TOKENIZER_ROWS), strict=False)]
    corpus = [
        f"system\n{SYSTEM}user\n{row['question']}assistant\nthink\n{row['thinking_trajectories'][0]}answer\n{row['attempt']}"
        for row in rows
    ]
    tokenizer = build_tokenizer(output / "tokenizer", corpus, vocab_size=512)
    model = Qwen(QwenConfig.from_hf({**_CONFIG, "vocab_size": len(tokenizer)}), dtype=jnp.float32)
    export_model(output / "start", model, model.init(jax.random.key(seed)))
    tokenizer.save_pretrained(output / "start")


def _num_parameters(directory: Path) -> int:
    model = Qwen(QwenConfig.from_directory(directory), dtype=jnp.float32)
    return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params()))


def _run(program: str, *words: str) -> None:
    subprocess.run([sys.executable, str(_ROOT / program), *words], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
