"""The counter of bytes on small programs, and on decode steps compiled for every kind of hardware."""

import json
from pathlib import Path

import pytest

from s1jax.planning.hardware import HARDWARE
from s1jax.planning.hlo import Program
from s1jax.planning.traffic import HostTraffic, Traffic, host_traffic, launches, memory_traffic
from tests.planning.conftest import plan
from tests.tiny import QWEN2

NEAR = "{0:T(1024)S(1)}"
SHAPES = {
    "h100": "1x4",
    "h200": "1x4",
    "a100-80g": "1x4",
    "rtx4090": "1x4",
    "b200": "1x4",
    "gb200": "1x4",
    "v5p": "2x2x1",
}
SHAPES |= {"v5e": "2x2", "v6e": "2x2", "tpu7x": "2x2x1", "rtx4090": "1x4"}


def traffic(*operations: str) -> Traffic:
    """Of a program with a parameter `a` of 1,024 floats and these operations."""
    lines = ["HloModule m", "", "ENTRY %main (a: f32[1024]) -> f32[1024] {", "  %a = f32[1024]{0} parameter(0)"]
    return memory_traffic(Program("\n".join([*lines, *(f"  {operation}" for operation in operations), "}"])))


def test_a_piece_brought_near_is_read_as_a_piece() -> None:
    pieces = [
        f"%start.{i} = ((f32[1024]{{0}}), f32[256]{NEAR}, s32[]{{:S(2)}}) slice-start(%a), slice={{[{i}:256]}}"
        for i in range(4)
    ]
    done = [f"%done.{i} = f32[256]{NEAR} slice-done(%start.{i})" for i in range(4)]
    joined = (
        f'%near = f32[1024]{NEAR} custom-call(%done.0, %done.1, %done.2, %done.3), custom_call_target="ConcatBitcast"'
    )
    assert traffic(*pieces, *done, joined) == (4 * 1024, {})


def test_a_copy_in_two_halves_counts_once() -> None:
    copied = "%start = (f32[1024]{0}, f32[1024]{0}, u32[]) copy-start(%a)"
    assert traffic(copied, "%b = f32[1024]{0} copy-done(%start)") == (2 * 4 * 1024, {})
    wrapped = "%start = ((f32[1024]{0}), f32[1024]{0}, u32[]) async-start(%a), calls=%wrapped"
    text = "\n".join(
        [
            "HloModule m",
            "",
            "%wrapped (b: f32[1024]) -> f32[1024] {",
            "  %b = f32[1024]{0} parameter(0)",
            "  ROOT %c = f32[1024]{0} negate(%b)",
            "}",
            "",
            "ENTRY %main (a: f32[1024]) -> f32[1024] {",
            "  %a = f32[1024]{0} parameter(0)",
            f"  {wrapped}",
            "  ROOT %done = f32[1024]{0} async-done(%start)",
            "}",
        ]
    )
    assert memory_traffic(Program(text)) == (2 * 4 * 1024, {})


FAR = "{0:S(5)}"
TPU_TRANSFERS = f"""
HloModule m

ENTRY %main (a: f32[64], i: s32[]) -> f32[64] {{
  %a = f32[64]{{0}} parameter(0)
  %i = s32[] parameter(1)
  %kept = f32[1024]{FAR} custom-call(), custom_call_target="AllocateBuffer"
  %out = ((f32[1024]{FAR}, f32[64]{{0}}, s32[]), f32[1024]{FAR}, u32[]) dynamic-update-slice-start(%kept, %a, %i)
  %written = f32[1024]{FAR} dynamic-update-slice-done(%out)
  %in = ((f32[1024]{FAR}, s32[]), f32[64]{{0}}, u32[]) dynamic-slice-start(%written, %i), dynamic_slice_sizes={{64}}
  ROOT %read = f32[64]{{0}} dynamic-slice-done(%in)
}}
"""
GPU_TRANSFERS = f"""
HloModule m

%put (k: f32[1024], b: f32[64], j: s32[]) -> f32[1024] {{
  %k = f32[1024]{FAR} parameter(0)
  %b = f32[64]{{0}} parameter(1)
  %j = s32[] parameter(2)
  ROOT %u = f32[1024]{FAR} dynamic-update-slice(%k, %b, %j)
}}

%take (k: f32[1024], j: s32[]) -> f32[64] {{
  %k = f32[1024]{FAR} parameter(0)
  %j = s32[] parameter(1)
  ROOT %s = f32[64]{{0}} dynamic-slice(%k, %j), dynamic_slice_sizes={{64}}
}}

ENTRY %main (a: f32[64], i: s32[]) -> f32[64] {{
  %a = f32[64]{{0}} parameter(0)
  %i = s32[] parameter(1)
  %kept = f32[1024]{FAR} custom-call(), custom_call_target="AllocateBuffer"
  %out = ((f32[1024]{FAR}, f32[64]{{0}}, s32[]), f32[1024]{FAR}, u32[]) fusion-start(%kept, %a, %i), calls=%put
  %written = f32[1024]{FAR} fusion-done(%out)
  %in = ((f32[1024]{FAR}, s32[]), f32[64]{{0}}, u32[]) fusion-start(%written, %i), calls=%take
  ROOT %read = f32[64]{{0}} fusion-done(%in)
}}
"""


@pytest.mark.parametrize("text", [TPU_TRANSFERS, GPU_TRANSFERS], ids=["TPU", "GPU"])
def test_what_goes_to_the_host_and_comes_back_passes_the_devices_memory_once_each(text: str) -> None:
    assert host_traffic(Program(text)) == HostTraffic(written=256, read=256)
    assert memory_traffic(Program(text)).unknown == {}
    # And of a fusion the index.
    assert memory_traffic(Program(text)).num_bytes == pytest.approx(2 * 256, abs=8)


def test_collectives_in_two_halves_read_their_operands_once() -> None:
    gather = "%start = (f32[1024]{0}, f32[4096]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}"
    assert traffic(gather, "%b = f32[4096]{0} all-gather-done(%start)") == (4 * (1024 + 4096), {})
    reduce = "%start = f32[1024]{0} all-reduce-start(%a), replica_groups={{0,1}}, to_apply=%sum"
    assert traffic(reduce, "%b = f32[1024]{0} all-reduce-done(%start)") == (2 * 4 * 1024, {})


def test_what_the_counter_does_not_know_is_named_and_not_counted() -> None:
    called = '%b = f32[1024]{0} custom-call(%a), custom_call_target="Mystery"'
    assert traffic(called, "%c = f32[1024]{0} transmogrify(%b)") == (0, {"Mystery": 1, "transmogrify": 1})


def test_launches_leave_out_what_runs_beside() -> None:
    text = """
HloModule m

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %start = (f32[1024]{0}, f32[1024]{0}, u32[]) copy-start(%a)
  %b = f32[1024]{0} copy-done(%start)
  %c = f32[1024]{0} bitcast(%b)
  ROOT %d = f32[1024]{0} add(%c, %c)
}
"""
    assert launches(Program(text)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 32])
@pytest.mark.parametrize("name", HARDWARE)
def test_a_decode_step_reads_weights_and_cache_once_on_all_hardware(name: str, rows: int, tmp_path: Path) -> None:
    """Two layers as wide as a 7B's."""
    sizes = {"hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32, "num_key_value_heads": 8}
    others = {"head_dim": 128, "vocab_size": 8192, "num_hidden_layers": 2, "max_position_embeddings": 32_768}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, **sizes, **others}))
    prefix = "tpu:" if HARDWARE[name].platform == "tpu" else ""
    words = (
        "decode.py",
        "generate",
        f"model.path={tmp_path}",
        "prompt=x",
        "model.dtype=bfloat16",
        f"batch_size={rows}",
    )
    mesh = ("mesh.fsdp=1", "mesh.tensor=-1", "max_total_tokens=8192")
    content = plan(tmp_path / "plan.json", *words, *mesh, "--plan", f"{prefix}{name}:{SHAPES[name]}")
    assert content["bytes_per_step"] <= 1.15 * content["least_bytes_per_step"], json.dumps(content, indent=1)
    assert content["unknown_operations"] == {}
    if HARDWARE[name].platform == "cuda":
        assert content["open_ends"] == 0
    assert "NOT COUNTED" not in content["text"]
