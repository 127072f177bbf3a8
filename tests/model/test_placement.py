"""The mesh that decoding chooses for itself, for the models and machines that it is meant for."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from s1jax.config import DecodingMeshSection
from s1jax.device_memory import GIB
from s1jax.mesh import MeshError, make_mesh
from s1jax.model.architectures import known_architecture
from s1jax.model.placement import Machine, MeshSizes, decoding_mesh_sizes, described
from s1jax.model.qwen import Qwen
from tests.decoding.conftest import ROOT, environment
from tests.tiny import QWEN2, model_directory

H100, H100_TWICE = Machine(8, 8, 74 * GIB), Machine(16, 8, 74 * GIB)
ONE_OPEN = DecodingMeshSection()


def qwen(name: str, dtype: str = "bfloat16") -> Qwen:
    config = known_architecture(f"Qwen/{name}")
    assert config is not None
    return Qwen(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("model", "machine", "expected"),
    [
        (qwen("Qwen2.5-32B-Instruct"), H100, (-1, 1, 8)),
        (qwen("Qwen2.5-32B-Instruct"), H100_TWICE, (-1, 1, 8)),
        # 28 heads, four of them of keys and values.
        (qwen("Qwen2.5-7B-Instruct"), H100, (-1, 1, 4)),
        (qwen("Qwen2.5-0.5B-Instruct"), H100, (-1, 1, 1)),
        (qwen("Qwen3-1.7B"), H100, (-1, 1, 2)),
        (qwen("Qwen2.5-32B-Instruct"), Machine(1, 1, 74 * GIB), (-1, 1, 1)),
        # Two hosts only where one has no room: tensor 16 is not for 40 heads, so weights are gathered.
        (qwen("Qwen3-32B"), Machine(8, 4, 15 * GIB), (-1, 1, 8)),
        (qwen("Qwen3-32B"), Machine(8, 4, 74 * GIB), (-1, 1, 4)),
        (qwen("Qwen2.5-32B-Instruct"), Machine(16, 8, 8 * GIB), (-1, 2, 8)),
        (qwen("Qwen2.5-32B-Instruct", "float32"), Machine(4, 4, 15 * GIB), (-1, 1, 4)),
        # Nobody knows how much memory a CPU may give.
        (qwen("Qwen2.5-0.5B-Instruct"), Machine(16, 16, None), (-1, 1, 1)),
    ],
)
def test_as_many_shards_as_are_worth_it_and_copies(model: Qwen, machine: Machine, expected: tuple[int, ...]) -> None:
    assert decoding_mesh_sizes(ONE_OPEN, model, machine) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tensor": 4}, (-1, 1, 4)),
        ({"tensor": -1}, (1, 1, -1)),
        ({"fsdp": -1}, (1, -1, 1)),
        ({"fsdp": 2}, (-1, 2, 4)),
        ({"data": 2}, (2, 1, 4)),
        ({"data": 8}, (8, 1, 1)),
        ({"data": -1, "tensor": 2}, (-1, 1, 2)),
        ({"data": 1, "fsdp": 4, "tensor": 2}, (1, 4, 2)),
    ],
)
def test_what_is_given_stays(given: dict[str, int], expected: tuple[int, ...]) -> None:
    assert decoding_mesh_sizes(DecodingMeshSection(**given), qwen("Qwen2.5-32B-Instruct"), H100) == expected


@pytest.mark.parametrize(
    "given", [{"tensor": 0}, {"tensor": 64}, {"tensor": -2}, {"fsdp": 0}, {"fsdp": -2}, {"data": 0}, {"data": 3}]
)
def test_what_cannot_be_is_refused(given: dict[str, int]) -> None:
    sizes = decoding_mesh_sizes(DecodingMeshSection(**given), qwen("Qwen2.5-32B-Instruct"), H100)
    with pytest.raises(MeshError, match=r"^mesh .* \(data x fsdp x tensor\)"):
        make_mesh(*sizes, jax.devices()[:8])


def test_gathered_weights_are_said() -> None:
    model = qwen("Qwen2.5-32B-Instruct")
    whole = described(ONE_OPEN, model, MeshSizes(1, 1, 8))
    assert whole == "mesh: data 1 (chosen) x fsdp 1 (chosen) x tensor 8 (chosen); 7.63 GiB of weights a device"
    gathered = described(DecodingMeshSection(fsdp=8, tensor=1), model, MeshSizes(1, 8, 1))
    assert gathered.startswith("mesh: data 1 (chosen) x fsdp 8 x tensor 1; 7.63 GiB of weights a device, and each step")
    assert "gathers 53.41 GiB more from the others: mesh.fsdp=1 gathers none" in gathered


def test_a_command_chooses_and_says_so(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", QWEN2)
    words = [f"model.path={directory}", "prompt=x", "budget.max_thinking_tokens=4", "budget.max_answer_tokens=4"]
    process = subprocess.run(
        [sys.executable, "decode.py", "generate", *words],
        cwd=ROOT,
        env={**environment(), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    line = "mesh: data 4 (chosen) x fsdp 1 (chosen) x tensor 1 (chosen); 0.00 GiB of weights a device"
    assert line in process.stderr.splitlines()
