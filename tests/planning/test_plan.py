"""The 32B recipe at full size, compiled for hardware that is not here; and what cannot be planned."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import jax
import pytest

from s1jax.device_memory import GIB
from s1jax.model.architectures import known_architecture
from s1jax.model.qwen import Qwen
from tests.planning.conftest import plan, run
from tests.tiny import QWEN2, model_directory

H100 = "configs/sft/s1-32b-h100-8x2.yaml"
WHOLE_MODEL = 4 * 32_763_876_352
"""Bytes of all parameters in float32."""


def check_parameters(content: dict[str, Any], fsdp: int, tensor: int) -> None:
    """Every matrix is spread over all devices, every other parameter at most over the tensor axis."""
    parameters = {
        name: tuple(map(ast.literal_eval, text.split(" as "))) for name, text in content["parameters"].items()
    }
    assert sum(math.prod(shape) for shape, _ in parameters.values()) * 4 == WHOLE_MODEL
    for name, (shape, part) in parameters.items():
        spread = math.prod(shape) // math.prod(part)
        is_matrix = not name.endswith("scale") and not name.endswith("bias")
        expected = {fsdp * tensor} if is_matrix else {1, tensor}
        assert spread in expected, f"{name}: {shape} as {part}"


def check_exchange(shape: dict[str, Any], microbatches: int, gradients: str = "reduce-scatter") -> None:
    """Layers are gathered, and their gradients summed and scattered, one by one; nothing gathers the whole model."""
    shards = [0, 2, 4, 6, 8, 10, 12, 14]
    runs = {kind: count for kind, group, count, _ in shape["collectives"] if group == shards}
    assert runs["all-gather"] >= microbatches * 3 * 64
    among_shards = [c for kind, group, c, _ in shape["collectives"] if kind == gradients and set(group) <= set(shards)]
    assert max(among_shards) >= microbatches * 64
    for _, _, count, num_bytes in shape["collectives"]:
        assert num_bytes / count < WHOLE_MODEL / 64


@pytest.mark.slow
def test_the_32b_step_fits_16_h100s_with_full_rows(tmp_path: Path) -> None:
    words = ("train.py", H100, "--plan", "h100:2x8", "plan.mean_length=null", "plan.price_per_device_hour=2.5")
    less = ("model.remat=full", "model.remat_by_length=null", "training.gradient_accumulation_steps=2")
    content = plan(tmp_path / "plan.json", *words, *less)
    (shape,) = content["shapes"]
    assert (shape["rows"], shape["length"], shape["steps"], content["steps"]) == (16, 32_768, 315, 315)
    assert content["fits"]
    assert content["peak_bytes"] <= 64 * GIB
    assert content["flop_ratio"] <= 1.36
    # State: parameters, and two moments, each in float32 on 16 devices.
    assert shape["memory"]["parameters"] == pytest.approx(WHOLE_MODEL / 16, rel=0.01)
    assert shape["memory"]["optimizer"] == pytest.approx(WHOLE_MODEL / 8, rel=0.01)
    check_parameters(content, fsdp=8, tensor=2)
    # cuDNN's flash attention: forward, again for the backward pass, and there.
    assert shape["kernels"] == {"__cudnn$fmhaSoftmax": 2 * 64 * 2, "__cudnn$fmhaSoftmaxBackward": 64 * 2}
    assert shape["score_arrays"] == 0
    check_exchange(shape, microbatches=2)
    assert "fits" in content["text"]
    assert "device-hours" in content["text"]


@pytest.mark.slow
def test_s1ks_lengths_packed_recompute_less(tmp_path: Path) -> None:
    """The preset as it is, but for one shape of rows instead of six, to compile only one."""
    content = plan(
        tmp_path / "plan.json",
        *("train.py", H100, "--plan", "h100:2x8", "plan.num_examples=16", "training.num_epochs=1"),
    )
    (shape,) = content["shapes"]
    assert 10_000 <= shape["length"] <= 12_288
    assert shape["remat"] == "heads"
    assert content["peak_bytes"] <= 72 * GIB
    assert content["flop_ratio"] <= 1.12
    assert shape["score_arrays"] == 0


@pytest.mark.slow
def test_the_32b_step_fits_a_v5p_32(tmp_path: Path) -> None:
    words = ("train.py", "configs/sft/s1-32b-tpu-v5p-32.yaml", "--plan", "tpu:v5p:2x2x4", "model.remat=full")
    content = plan(tmp_path / "plan.json", *words, "plan.mean_length=null")
    (shape,) = content["shapes"]
    assert shape["length"] == 32_768
    assert content["fits"]
    assert content["flop_ratio"] <= 1.36
    assert shape["kernels"]["tpu_custom_call"] >= 3
    # TPU's compiler passes gradients around the ring while they are computed.
    check_exchange(shape, microbatches=1, gradients="collective-permute")
    assert shape["score_arrays"] == 0
    check_parameters(content, fsdp=8, tensor=2)


@pytest.mark.slow
def test_a_search_ranks_what_fits_and_leaves_out_what_needs_more_than_what_does_not(tmp_path: Path) -> None:
    """A wide model of few layers, of which one microbatch fits with little kept or not at all, two with more; how much
    more differs from one compiler to the next."""
    wide = {"hidden_size": 2048, "intermediate_size": 16_384, "num_attention_heads": 16, "num_key_value_heads": 2}
    model = model_directory(tmp_path / "model", {**QWEN2, **wide, "head_dim": 128, "vocab_size": 512})
    words = (f"model.path={model}", "data.path=none", "training.output_dir=none", "data.block_size=32768")
    process = run("train.py", *words, "--plan", "h100:1x1", "plan.search=true", f"plan.output={tmp_path}/plan.json")
    assert process.returncode == 0, process.stderr
    plans = json.loads((tmp_path / "plan.json").read_text())
    tried = {(p["gradient_accumulation_steps"], p["remat"]): p["fits"] for p in plans}
    assert len(tried) == len(plans)
    assert tried[2, "gate"]
    by_need = ["full", "gate", "offload", "heads", "dots", "none"]
    for microbatches in (1, 2):
        fits = [tried[microbatches, remat] for remat in by_need if (microbatches, remat) in tried]
        # All from the least on, up to the first that does not fit.
        assert [(microbatches, remat) in tried for remat in by_need] == [i < len(fits) for i in range(len(by_need))]
        assert fits == [True] * (len(fits) - 1) + [False]
    assert all(p["block_size"] == 32_768 for p in plans)
    ranks = [(not p["fits"], p["seconds"]) for p in plans]
    assert ranks == sorted(ranks)
    assert "ranked (those that fit first, by time):" in process.stdout


@pytest.mark.slow
def test_what_is_offloaded_is_neither_kept_nor_computed_again(tmp_path: Path) -> None:
    layers, wide, heads, kv_heads = 6, 16_384, 16, 2
    sizes = {"hidden_size": 2048, "intermediate_size": wide, "num_attention_heads": heads, "head_dim": 128}
    sizes |= {"num_hidden_layers": layers, "num_key_value_heads": kv_heads, "vocab_size": 512}
    model = model_directory(tmp_path / "model", {**QWEN2, **sizes})
    words = (f"model.path={model}", "data.path=none", "training.output_dir=none", "data.block_size=8192")
    shapes = {}
    for remat in ("gate", "offload"):
        content = plan(tmp_path / "plan.json", "train.py", *words, "--plan", "h100:1x2", f"model.remat={remat}")
        (shapes[remat],) = content["shapes"]
    gate, offload = shapes["gate"], shapes["offload"]
    kept = layers * 2 * (wide + 128 * (heads + 2 * kv_heads)) * offload["rows"] * offload["length"] // 2
    assert offload["memory"]["on_host"] == pytest.approx(kept, rel=0.01)
    assert offload["estimate"]["host"] == pytest.approx(2 * kept / 64e9, rel=0.01)
    assert gate["memory"]["on_host"] == gate["estimate"]["host"] == 0
    assert offload["memory"]["temporaries"] < 1.1 * gate["memory"]["temporaries"]
    assert offload["dot_flops"] < 1.01 * offload["model_flops"] < gate["dot_flops"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100:1x8", "tpu:v5p:2x2x2"])
def test_a_decode_step_of_32b_reads_weights_and_cache_once(target: str, tmp_path: Path) -> None:
    words = ("decode.py", "generate", "configs/decode/s1-32b.yaml", "prompt=x", "--plan", target)
    sizes = ("model.dtype=bfloat16", "mesh.fsdp=1", "mesh.tensor=8", "batch_size=16", "max_total_tokens=16384")
    content = plan(tmp_path / "plan.json", *words, *sizes)
    assert content["fits"]
    weights, cache = WHOLE_MODEL / 2 / 8, 16 * 16_384 * 64 * 2 * 128 * 2
    assert content["bytes_per_step"] <= 1.15 * (weights + cache)
    # The table of embeddings, 152,064 x 5,120, is only looked up in.
    assert content["least_bytes_per_step"] == pytest.approx(weights + cache - 152_064 * 5120 * 2 / 8, rel=0.01)
    # The cache is updated where it is: nothing near its size is held beside it.
    assert content["memory"]["temporaries"] < 0.02 * cache
    assert content["rows_that_fit"] > 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("b300:1x8",), "error: plan target 'b300:1x8': not known; examples: h100:2x8, "),
        (("v5p:2x2x4",), "error: plan target 'v5p:2x2x4': not known; examples: "),
        (("h100:16",), "error: plan target 'h100:16': the shape of GPUs is HOSTSxGPUS, as in h100:2x8"),
        (("h100:2x4",), "error: mesh 1x8x2 (data x fsdp x tensor) does not match the 8 devices: "),
        (("h100:3x8", "mesh.tensor=3"), "error: 'kv_heads' has size 8, which tensor = 3 does not divide"),
        (("h100:2x8", "data.packing=false", "training.batch_size=12"), "batch_size=12 must be a multiple of the 8"),
        (("h100:2x8", "plan.mean_length=40000"), "error: plan.mean_length (40000) must be from 2 to the longest"),
        (("tpu:v5p:7x9x9",), "error: tpu:v5p:7x9x9: the compiler does not take this target: "),
        (("h100:2x8", "model.path=no/such-model"), "error: model.path no/such-model: no such directory, "),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(words: tuple[str, ...], message: str) -> None:
    process = run("train.py", H100, "--plan", *words)
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize(
    ("target", "install"), [("h100:2x8", "jax-cuda12-plugin==0."), ("tpu:v5p:2x2x4", "'jax[tpu]==0.")]
)
def test_a_compiler_that_is_missing_is_named(target: str, install: str) -> None:
    process = run("train.py", H100, "--plan", target, compilers=False)
    assert process.returncode == 1
    assert f"pip install {'--no-deps ' if 'cuda' in install else ''}{install}" in process.stderr


PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 0.49,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-3B-Instruct": 3.09,
    "Qwen/Qwen2.5-7B-Instruct": 7.6,
    "Qwen/Qwen2.5-14B-Instruct": 14.8,
    "Qwen/Qwen2.5-72B-Instruct": 72.7,
    "simplescaling/s1-32B": 32.8,
    "Qwen/QwQ-32B": 32.8,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.62,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14.8,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": 32.8,
    "Qwen/Qwen3-0.6B": 0.6,
    "Qwen/Qwen3-1.7B": 1.7,
    "Qwen/Qwen3-4B": 4.0,
    "Qwen/Qwen3-8B": 8.2,
    "Qwen/Qwen3-14B": 14.8,
    "Qwen/Qwen3-32B": 32.8,
}
"""Billions of parameters, as the models' cards or their files' sizes on the hub say."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_architectures_have_their_published_number_of_parameters(name: str) -> None:
    config = known_architecture(name)
    assert config is not None
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(Qwen(config).abstract_params(None)))
    digits = len(str(PUBLISHED[name]).partition(".")[2])
    assert round(count / 1e9, digits) == PUBLISHED[name]


def test_an_unknown_architecture_is_none() -> None:
    assert known_architecture("someone/else") is None
