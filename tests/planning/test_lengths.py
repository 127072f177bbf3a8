"""The lengths that a plan assumes."""

import json
from pathlib import Path

import numpy as np
import pytest

from s1jax.config_reader import load_config
from s1jax.planning.hardware import PlanError
from s1jax.planning.lengths import example_lengths
from s1jax.training.config import TrainConfig
from tests.tiny import model_directory


def config(*words: str) -> TrainConfig:
    return load_config(TrainConfig, ["model.path=Qwen/Qwen2.5-32B", "data.path=none", "training.output_dir=x", *words])


def test_without_data_lengths_are_full_rows_or_log_normal_of_the_mean_given() -> None:
    lengths, source = example_lengths(config("data.block_size=500", "plan.num_examples=3"))
    assert lengths.tolist() == [500] * 3
    assert source.startswith("assumed")
    lengths, _ = example_lengths(config("plan.mean_length=5200", "plan.max_length=9109"))
    assert len(lengths) == 1000
    assert lengths.mean() == pytest.approx(5200, abs=2)
    assert lengths.max() == 9109
    # Of s1K, 26% are below 4,096 tokens (s1 paper, table 8).
    assert np.mean(lengths < 4096) == pytest.approx(0.26, abs=0.02)
    with pytest.raises(PlanError, match="must be from 2 to the longest"):
        example_lengths(config("plan.mean_length=600", "data.block_size=500"))


def test_lengths_are_read_where_the_data_is_there(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"question": "How many?", "thinking_trajectories": ["3 and 4 " * n], "attempt": "7"} for n in (1, 9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = model_directory(tmp_path / "model")
    lengths, source = example_lengths(config(f"model.path={model}", f"data.path={data}"))
    assert source == f"read from {data}"
    short, long = lengths.tolist()
    assert long - short >= 8 * 4
