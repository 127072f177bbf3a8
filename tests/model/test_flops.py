"""The FLOP formula against a count of the multiplications that the model's program has."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Jaxpr, jaxprs_in_params

from s1jax.model import cpu_kernel
from s1jax.model.config import QwenConfig
from s1jax.model.flops import peak_flops, training_flops
from s1jax.model.qwen import Qwen
from tests.tiny import QWEN2, QWEN3

LENGTH = 80


def matmul_flops(jaxpr: Jaxpr) -> int:
    """Two for each multiply-add of every product, XLA's or the CPU kernel's, those in scans counted each time."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        elif equation.params.get("target_name") == cpu_kernel.MATMUL:
            (rows, columns), left = equation.outvars[0].aval.shape, equation.invars[0].aval
            total += 2 * rows * columns * (left.size // rows)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(matmul_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_the_formula_counts_the_multiplications(config: dict) -> None:
    model = Qwen(QwenConfig.from_hf(config), dtype=jnp.float32, attention="plain")
    ids = jnp.zeros((1, LENGTH), jnp.int32)

    def forward(params):
        hidden, _ = model.hidden_states(params, ids, jnp.arange(LENGTH)[None])
        return model.logits(params, hidden)

    forward_flops = matmul_flops(jax.make_jaxpr(forward)(model.abstract_params()).jaxpr)
    c = model.config
    # Plain attention computes the invisible half too, which the convention leaves out; backward costs twice forward.
    invisible = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * LENGTH**2
    assert training_flops(c, None, LENGTH, LENGTH**2) == 3 * (forward_flops - invisible)


def test_peaks_are_found_by_the_beginning_of_the_kind() -> None:
    assert peak_flops(["NVIDIA H100 80GB HBM3"] * 16) == 16 * 989e12
    assert peak_flops(["TPU v5"]) == 459e12
    assert peak_flops(["TPU v5 lite"]) == 197e12
    assert peak_flops(["TPU v5", "cpu"]) is None
