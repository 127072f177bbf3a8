"""Training steps of as many layers of each model as fit, beside what a plan says of the same program."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.device.report import Report, Row
from benchmarks.device.sizes import Sizes
from benchmarks.device.timing import seconds_of, shares_of_time
from s1jax.config import Remat
from s1jax.data.packing import Batch
from s1jax.device_memory import limit_bytes
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.flops import peak_flops, training_flops
from s1jax.model.qwen import Qwen
from s1jax.training.config import OptimizerSection
from s1jax.training.step import abstract_state, batch_sharding, compile_step, init_state

_EXAMPLES = 2
"""Of a row: s1K's are 4,700 tokens long on average."""
_REMAT: tuple[Remat, ...] = ("gate", "offload")


def run(report: Report, sizes: Sizes) -> None:
    """A step of each model, with what the presets keep and with some of it moved to the host's memory."""
    for name, config in sizes.models.items():
        for remat in _REMAT:
            case = f"{name}, remat {remat}"
            report.case("Training", case, partial(_step, report, case, config, remat, sizes))


def _step(report: Report, name: str, config: QwenConfig, remat: Remat, sizes: Sizes) -> Row:
    device = jax.local_devices()[0]
    memory = limit_bytes(device) or 0
    mesh, section = make_mesh(1, 1, 1, [device]), OptimizerSection()
    config = replace(config, num_hidden_layers=_layers(config, sizes.training_memory * memory))
    model = Qwen(config, remat=remat)
    length = sizes.row
    lengths = np.full((1, 1, _EXAMPLES), length // _EXAMPLES, np.int32)
    positions = np.tile(np.arange(length // _EXAMPLES, dtype=np.int32), _EXAMPLES)[None, None]
    ids = np.repeat(np.arange(1, _EXAMPLES + 1, dtype=np.int32), length // _EXAMPLES)[None, None]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 1, length)).astype(np.int32)
    batch = Batch(tokens, tokens, positions, ids, lengths, np.full((1, 1, length), 1 / length, np.float32))
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, batch_sharding(mesh))
        started = time.perf_counter()
        jitted: Any = compile_step(model, section, 100, mesh)
        step = jitted.lower(abstract_state(model, section, mesh), {}, batch).compile()
        compiled_in = time.perf_counter() - started
        state = [init_state(model, section, mesh, model.init(jax.random.key(0), mesh))]

        def take() -> Any:
            state[0], metrics = step(state[0], {}, batch)
            return metrics

        first = float(take().loss)
        seconds = seconds_of(take, repeats=3)
        parts = shares_of_time(take)
        last = float(take().loss)
    report.verdict(
        f"training learns its batch ({name})", passed=last < first, found=f"loss {first:.3f}, then {last:.3f}"
    )
    peak = peak_flops([device.device_kind])
    flops = training_flops(config, None, length, int(np.sum(lengths.astype(np.int64) ** 2)))
    analysis = step.memory_analysis()
    planned = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    measured = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "layers": config.num_hidden_layers,
        "tokens": length,
        "ms": 1e3 * seconds,
        "tokens/s": length / seconds,
        "share of peak": flops / seconds / peak if peak else None,
        **{f"time in {part}": share for part, share in parts.items()},
        "compile s": compiled_in,
        "planned GiB": planned / 2**30,
        "peak GiB": measured / 2**30 if measured else None,
    }


def _layers(config: QwenConfig, room: float) -> int:
    """How many layers' parameters, moments and gradients, all in float32, fit."""

    def state_bytes(layers: int) -> float:
        shapes = Qwen(replace(config, num_hidden_layers=layers)).abstract_params()
        return 16.0 * sum(leaf.size for leaf in jax.tree.leaves(shapes))

    one, two = state_bytes(1), state_bytes(2)
    return max(1, min(config.num_hidden_layers, 1 + int((room - one) / (two - one))))
