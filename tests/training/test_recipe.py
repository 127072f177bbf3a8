"""The numbers of the recipe: those of a plain torch loop, and of the original's schedule."""

import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from s1jax.config_reader import load_config
from s1jax.data.examples import Example, load_examples
from s1jax.data.loader import StepLoader
from s1jax.data.packing import Batch
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.qwen import Qwen
from s1jax.training.config import OptimizerSection, TrainConfig, TrainedModelSection
from s1jax.training.loop import for_rows, train
from s1jax.training.optimizer import learning_rate
from s1jax.training.step import abstract_state, batch_sharding, compile_step, gradients, init_state
from tests.tiny import QWEN2, QWEN3, model_directory, random_params
from tests.training.conftest import Command, metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "packing", "loss_average"),
    [
        pytest.param(QWEN2, True, "sample", id="qwen2"),
        pytest.param(QWEN2, False, "sample", id="qwen2-unpacked"),
        pytest.param(QWEN2, True, "token", id="qwen2-token-average"),
        pytest.param(QWEN3, True, "sample", id="qwen3"),
        pytest.param(QWEN3, False, "sample", id="qwen3-unpacked"),
    ],
)
def test_twenty_steps_equal_the_torch_loop(
    config: dict, packing: bool, loss_average: str, command: Command, traces: Path, tmp_path: Path
) -> None:
    if sys.version_info >= (3, 12):
        pytest.skip("torch 2.13.0 is installed on Python 3.11 only")
    from tests.reference import torch_training

    directory = model_directory(tmp_path / "model", config)
    words = [
        f"model.path={directory}",
        "data.shuffle=false",
        f"data.packing={packing}",
        "training.num_epochs=7",
        f"training.loss_average={loss_average}",
        "mesh.fsdp=4" if packing else "mesh.fsdp=2",
        "mesh.tensor=2",
        f"mesh.data={2 if packing else 4}",
        *(("model.remat_by_length={128: heads}",) if packing else ("training.batch_size=8",)),
    ]
    settings = load_config(TrainConfig, [*command(tmp_path / "run", *words)[2:]])
    assert train(settings) == 0
    tokenizer = AutoTokenizer.from_pretrained(directory)
    examples = load_examples(str(traces), tokenizer, block_size=256, overlong="error").examples
    batch = settings.training.batch_size
    expected = torch_training.train(
        directory, examples, epochs=7, batch_size=batch, rate=1e-3, loss_average=loss_average
    )
    actual = metrics(tmp_path / "run")
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual[:20], expected[:20], strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-9), (ours["step"], name)


def test_the_shortest_limit_that_has_room_says_what_is_kept() -> None:
    section = TrainedModelSection(path="none", remat="full", remat_by_length={256: "gate", 128: "heads"})
    model = Qwen(QwenConfig.from_hf(QWEN2), remat="full")
    kept = [for_rows(model, section, length).remat for length in (64, 128, 129, 256, 257)]
    assert kept == ["heads", "heads", "gate", "gate", "full"]


def test_s1k_takes_315_steps_with_16_of_warm_up() -> None:
    example = Example(np.arange(8, dtype=np.int32), np.arange(8) > 3)
    loader = StepLoader(
        [example] * 1000,
        batch_size=16,
        num_epochs=5,
        shuffle=True,
        seed=0,
        packing=True,
        loss_average="sample",
        max_row_length=256,
        num_microbatches=1,
        num_shards=8,
        row_shard=(0, 1),
        pad_id=0,
    )
    assert len(loader) == 315
    rate = learning_rate(OptimizerSection(), 315)
    assert float(rate(jnp.array(0))) == 0
    assert float(rate(jnp.array(8))) == pytest.approx(0.5e-5)
    assert float(rate(jnp.array(16))) == pytest.approx(1e-5)
    assert float(rate(jnp.array(315))) == pytest.approx(0, abs=1e-12)


def some_batch(microbatches: int, rows: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    shape = (8, 32)
    positions = np.tile(np.arange(32), (8, 1))
    arrays = [rng.integers(0, 368, shape), rng.integers(0, 368, shape), positions, np.ones(shape, int)]
    weights = rng.random(shape).astype(np.float32) / 256
    lengths = np.full((8, 1), 32)
    return Batch(*(jnp.asarray(x.reshape(microbatches, rows, -1)) for x in (*arrays, lengths, weights)))


def test_accumulated_gradients_are_those_of_the_big_batch() -> None:
    model = Qwen(QwenConfig.from_hf(QWEN2), dtype=jnp.float32)
    params = random_params(model)
    whole = jax.jit(lambda p, b: gradients(model, p, {}, b))(params, some_batch(1, 8))
    parts = jax.jit(lambda p, b: gradients(model, p, {}, b))(params, some_batch(4, 2))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, float(np.abs(a).max())))


def test_the_logits_of_all_tokens_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size = 5003  # A prime: arrays over the vocabulary are told by their shape.
    monkeypatch.setattr("s1jax.model.token_logprobs._LOGITS_PER_CHUNK", 512 * vocab_size)
    model = Qwen(QwenConfig.from_hf({**QWEN2, "vocab_size": vocab_size}), dtype=jnp.float32)
    ids = jnp.zeros((1, 8, 512), jnp.int32)
    batch = Batch(ids, ids, ids, ids, jnp.zeros((1, 8, 1), jnp.int32), jnp.zeros((1, 8, 512)))
    compute = jax.jit(lambda p, b: gradients(model, p, {}, b))
    text = compute.lower(model.abstract_params(), batch).compile().as_text()
    shapes = [tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    over_vocabulary = [math.prod(shape) // vocab_size for shape in shapes if vocab_size in shape]
    assert max(over_vocabulary) == 512


def test_a_step_that_is_not_finite_changes_nothing_and_the_state_is_reused() -> None:
    mesh, section = make_mesh(1, 8, 2), OptimizerSection(learning_rate=1e-3, warmup_ratio=0)
    model = Qwen(QwenConfig.from_hf(QWEN2), dtype=jnp.float32, remat="full")
    with jax.set_mesh(mesh):
        state = init_state(model, section, mesh, model.init(jax.random.key(0), mesh))
        take = compile_step(model, section, 10, mesh)
        batch = jax.device_put(some_batch(1, 8), batch_sharding(mesh))
        state, metrics = take(state, {}, batch)
        assert bool(metrics.finite)
        before = jax.device_get((state.params, state.optimizer))
        bad = batch._replace(weights=batch.weights.at[0, 0, 0].set(jnp.inf))
        state, metrics = take(state, {}, jax.device_put(bad, batch_sharding(mesh)))
        assert not bool(metrics.finite)
        assert int(state.step) == 2
        jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.optimizer)), before)
        abstract = abstract_state(model, section, mesh)
        memory = take.lower(abstract, {}, batch).compile().memory_analysis()
        held = sum(shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards[:1])
        assert memory.alias_size_in_bytes >= 0.95 * held
