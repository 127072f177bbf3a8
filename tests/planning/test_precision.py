"""float32 is float32: no product of a program in float32 is left to what an accelerator takes for it."""

import json
import os
import subprocess
import sys

import pytest

from tests.planning.conftest import COMPILERS, ROOT
from tests.tiny import QWEN2

PROGRAM = """
import json, re, sys
from s1jax.planning.hardware import parse_target, use_compilers_only
use_compilers_only()
import jax, jax.numpy as jnp
from s1jax.training.config import OptimizerSection
from s1jax.data.packing import Batch
from s1jax.decoding.score import _score_batch
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.qwen import Qwen
from s1jax.training.step import abstract_state, batch_sharding, compile_step

target = parse_target(sys.argv[1])
mesh = make_mesh(1, 1, -1, target.devices()[:2])
config = QwenConfig.from_hf(json.loads(sys.argv[2]))
model = Qwen(config, dtype=jnp.float32, param_dtype=jnp.float32)
state = abstract_state(model, OptimizerSection(), mesh)
step = compile_step(model, OptimizerSection(), 10, mesh)
rows = jax.ShapeDtypeStruct((1, 4, 256), jnp.int32, sharding=batch_sharding(mesh))
segments = jax.ShapeDtypeStruct((1, 4, 2), jnp.int32, sharding=batch_sharding(mesh))
weights = jax.ShapeDtypeStruct((1, 4, 256), jnp.float32, sharding=batch_sharding(mesh))
with jax.set_mesh(mesh):
    params = model.abstract_params(mesh, stacked=False)
    score = _score_batch.lower(model, params, jax.ShapeDtypeStruct((4, 200), jnp.int32))
    train = step.lower(state, {}, Batch(rows, rows, rows, rows, segments, weights))
    products = [
        line.strip()
        for program in (score, train)
        for line in program.compile().as_text().splitlines()
        if re.search(r" (dot|convolution)\\(|__cublas|__triton_gemm", line)
    ]
print(json.dumps(products))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100:1x2", "tpu:v5p:2x2x1"])
def test_every_product_in_float32_has_the_highest_precision(target: str) -> None:
    config = {**QWEN2, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(COMPILERS)}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, target, json.dumps(config)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    products = json.loads(process.stdout)
    assert len(products) > 40
    assert [line for line in products if "operand_precision={highest,highest}" not in line] == []
