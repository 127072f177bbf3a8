"""Adapters and quantised weights at full size, compiled for one host and for one card."""

from pathlib import Path

import pytest

from s1jax.device_memory import GIB
from tests.planning.conftest import plan

ONE_SHAPE = ("plan.num_examples=16", "training.num_epochs=1")
"""Of rows, to compile only one program."""
LAYERS = 64 * 487_587_840
"""Weights of all projections of the 32B."""


@pytest.mark.slow
def test_adapters_of_the_32b_on_one_host(tmp_path: Path) -> None:
    words = ("train.py", "configs/sft/s1-32b-lora-h100-1x8.yaml", "--plan", "h100:1x8", *ONE_SHAPE)
    content = plan(tmp_path / "plan.json", *words)
    (shape,) = content["shapes"]
    assert content["peak_bytes"] <= 40 * GIB
    adapters = 256 * 64 * (2 * (5120 + 5120) + 2 * (5120 + 1024) + 3 * (5120 + 27_648))
    assert shape["memory"]["optimizer"] == pytest.approx(2 * 4 * adapters / 8, rel=0.001)
    base = 2 * (LAYERS + 2 * 152_064 * 5120)
    assert shape["memory"]["parameters"] == pytest.approx((base + 4 * adapters) / 8, rel=0.001)
    # Twice forward and once backward, without the gradients of the weights.
    assert content["flop_ratio"] <= 1.4
    assert shape["estimate"]["compute"] * 8 / 3600 * 315 <= 1.1 * 4.2


@pytest.mark.slow
def test_adapters_of_the_32b_on_one_card(tmp_path: Path) -> None:
    words = ("train.py", "configs/sft/s1-32b-int8-lora-h100-1x1.yaml", "--plan", "h100:1x1", *ONE_SHAPE)
    full_rows = ("plan.mean_length=null", "plan.max_length=null", "training.gradient_accumulation_steps=16")
    content = plan(tmp_path / "plan.json", *words, *full_rows, "plan.storage_gigabytes_per_second=2")
    (shape,) = content["shapes"]
    assert (shape["length"], content["fits"]) == (12_288, True)
    assert content["peak_bytes"] <= 72 * GIB
    # Widened, without the scales: of 64 layers also the biases and two norms.
    others = 64 * (5120 + 2 * 1024 + 2 * 5120) + 5120 + 2 * 152_064 * 5120
    assert content["storage"]["export_bytes"] == 2 * (LAYERS + others)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100:1x1", "tpu:v6e:2x2"])
def test_eight_bits_are_widened_inside_the_products(target: str, tmp_path: Path) -> None:
    chips = 1 if target == "h100:1x1" else 4
    words = ("decode.py", "generate", "model.path=Qwen/Qwen2.5-32B-Instruct", "prompt=x", "--plan", target)
    mesh = ("mesh.fsdp=1", f"mesh.tensor={chips}", "model.weights=int8")
    sizes = ("batch_size=16", "max_total_tokens=2048", "budget.max_answer_tokens=512")
    content = plan(tmp_path / "plan.json", *words, *mesh, *sizes)
    assert content["fits"]
    assert content["bytes_per_step"] <= 1.10 * content["least_bytes_per_step"]
    weights = LAYERS + 2 * 152_064 * 5120
    assert content["memory"]["parameters"] == pytest.approx(weights / chips, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "rows", "at_most"), [("h100:1x1", 1, 1.12), ("h100:1x1", 8, 1.5), ("tpu:v6e:2x2", 1, 1.3)]
)
def test_four_bits_are_widened_inside_the_products_of_few_rows(
    target: str, rows: int, at_most: float, tmp_path: Path
) -> None:
    words = ("decode.py", "generate", "model.path=Qwen/Qwen2.5-7B-Instruct", "prompt=x", "--plan", target)
    sizes = (f"batch_size={rows}", "max_total_tokens=2048", "budget.max_answer_tokens=512")
    content = plan(tmp_path / "plan.json", *words, "model.weights=int4", *sizes)
    # GPUs write the sums of each group of 128 inputs: for 8 rows, half of the bytes of the integers.
    assert content["bytes_per_step"] <= at_most * content["least_bytes_per_step"]


@pytest.mark.slow
def test_a_cache_of_int8_has_room_for_more_rows(tmp_path: Path) -> None:
    words = ("decode.py", "generate", "model.path=Qwen/Qwen2.5-0.5B-Instruct", "prompt=x", "--plan", "h100:1x1")
    sizes = ("batch_size=16", "max_total_tokens=2048", "budget.max_answer_tokens=512")
    plain = plan(tmp_path / "plain.json", *words, *sizes)
    int8 = plan(tmp_path / "int8.json", *words, *sizes, "cache.dtype=int8")
    # Keys and values of 24 layers with 2 heads of 64, in pages of 64 tokens, of which one is nobody's.
    tokens = 16 * 2048 + 64
    assert plain["memory"]["batch"] == tokens * 24 * 2 * 2 * 64 * 2
    assert int8["memory"]["batch"] == tokens * 24 * 2 * 2 * (64 + 4)
    assert int8["rows_that_fit"] > 1.5 * plain["rows_that_fit"]
    assert int8["bytes_per_step"] < plain["bytes_per_step"]
