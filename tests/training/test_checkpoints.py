"""Checkpoints themselves, on a disk and in both stores: what comes back, on which mesh, and what damage does."""

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.qwen import Qwen
from s1jax.paths import AnyPath, BucketPath, files_below, write_whole
from s1jax.training.checkpoint import Cadence, Checkpoints, DamagedCheckpointsError
from s1jax.training.config import CheckpointSection, OptimizerSection
from s1jax.training.step import TrainState, abstract_state
from tests.tiny import QWEN3

MODEL = Qwen(QwenConfig.from_hf(QWEN3), dtype=jnp.float32)


def wanted(mesh: jax.sharding.Mesh) -> TrainState:
    """The state of a model with moments in bfloat16."""
    return abstract_state(MODEL, OptimizerSection(moments_dtype="bfloat16"), mesh)


def some_state(mesh: jax.sharding.Mesh, step: int) -> TrainState:
    """Random numbers, and zeros in one array: zarr would leave them out."""
    rng = np.random.default_rng(step)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(draw, wanted(mesh))
    state.params["norm"]["scale"] = jnp.zeros_like(state.params["norm"]["scale"])
    return state._replace(step=jax.device_put(jnp.array(step, jnp.int32), state.step.sharding))


def small_state(step: int, rows: int = 8) -> TrainState:
    """Three arrays on two devices."""
    rng = np.random.default_rng(step)
    sharding = jax.sharding.NamedSharding(make_mesh(1, 2, 1, jax.devices()[:2]), jax.sharding.PartitionSpec("fsdp"))
    whole = sharding.update(spec=jax.sharding.PartitionSpec())
    matrix, moment = (jax.device_put(rng.standard_normal((rows, 4), np.float32), sharding) for _ in range(2))
    return TrainState(jax.device_put(jnp.array(step, jnp.int32), whole), {"matrix": matrix}, {"mu": moment})


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def saved(root: AnyPath, *steps: int) -> None:
    checkpoints = opened(root)
    for step in steps:
        checkpoints.save(small_state(step), {"step": step})
    checkpoints.close()


def opened(root: AnyPath, keep: int = 2) -> Checkpoints:
    return Checkpoints(root / "checkpoints", root / "damaged", keep)


def names(directory: AnyPath) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


@pytest.mark.slow
def test_a_state_comes_back_bit_by_bit_on_every_mesh(root: AnyPath) -> None:
    mesh = make_mesh(1, 8, 2)
    states = {step: some_state(mesh, step) for step in (3, 7, 9)}
    checkpoints = opened(root)
    for step, state in states.items():
        checkpoints.save(state, {"step": step, "seed": 1})
    checkpoints.close()
    assert names(root / "checkpoints") == ["7", "9"]
    for sizes in [(2, 4, 2), (1, 16, 1), (1, 1, 1)]:
        expected = wanted(make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)]))
        checkpoints = opened(root)
        restored = checkpoints.restore(expected)
        checkpoints.close()
        assert restored is not None
        assert restored.loader == {"step": 9, "seed": 1}
        jax.tree.map(np.testing.assert_array_equal, restored.state, states[9])
        for ours, like in zip(jax.tree.leaves(restored.state), jax.tree.leaves(expected), strict=True):
            assert (ours.dtype, ours.sharding) == (like.dtype, like.sharding)


def test_there_is_nothing_where_nothing_was_saved(root: AnyPath) -> None:
    checkpoints = opened(root)
    assert checkpoints.restore(abstract(small_state(1))) is None
    assert checkpoints.latest_step() is None
    checkpoints.close()


def flip(path: AnyPath) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    write_whole(path, bytes(content))


def cut(path: AnyPath) -> None:
    write_whole(path, path.read_bytes()[:-1])


def remove(path: AnyPath) -> None:
    path.unlink()


def nest(path: AnyPath) -> None:
    write_whole(path, "[" * 100_000)


def lose_entry(path: AnyPath) -> None:
    manifest = json.loads(path.read_bytes())
    del manifest["files"]["step/c"]
    write_whole(path, json.dumps(manifest))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("params.matrix/c/1/0", flip, "params.matrix/c/1/0 has changed"),
        ("optimizer.mu/c/0/0", cut, "optimizer.mu/c/0/0 has changed"),
        ("step/c", remove, "step/c is gone"),
        ("params.matrix/zarr.json", flip, "params.matrix/zarr.json has changed"),
        ("loader.json", flip, "loader.json has changed"),
        ("manifest.0.json", cut, "manifest.0.json has changed"),
        ("manifest.0.json", remove, "manifest.0.json is gone"),
        ("manifest.0.json", nest, "manifest.0.json has changed"),
        ("manifest.0.json", lose_entry, "manifest.0.json has changed"),
    ],
)
def test_what_is_damaged_is_named_and_set_aside(
    file: str, damage: Callable[[AnyPath], None], said: str, root: AnyPath, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(root, 1, 2)
    damage(root / "checkpoints" / "2" / "default" / file)
    count = len(files_below(root / "checkpoints" / "2"))
    checkpoints = opened(root)
    restored = checkpoints.restore(abstract(small_state(2)))
    assert restored is not None
    assert restored.loader == {"step": 1}
    jax.tree.map(np.testing.assert_array_equal, restored.state, small_state(1))
    assert f"checkpoint 2 is damaged ({said}); moved to {root}/damaged/2" in capsys.readouterr().out
    assert len(files_below(root / "damaged" / "2")) == count
    checkpoints.save(small_state(2), {"step": 2})
    checkpoints.close()
    assert names(root / "checkpoints") == ["1", "2"]


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "commit_success.txt", "default/commit_success.txt"])
@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_damage_to_orbaxs_own_files_costs_a_checkpoint_at_most(
    file: str, damage: Callable[[AnyPath], None], root: AnyPath
) -> None:
    saved(root, 1, 2)
    path = root / "checkpoints" / "2" / file
    if path.exists():  # On a disk only some of them are written.
        damage(path)
    checkpoints = opened(root)
    restored = checkpoints.restore(abstract(small_state(2)))
    checkpoints.close()
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, restored.state, small_state(int(restored.state.step)))


def test_when_all_are_damaged_it_says_so(root: AnyPath) -> None:
    saved(root, 1)
    flip(root / "checkpoints" / "1" / "default" / "params.matrix" / "c" / "0" / "0")
    checkpoints = opened(root)
    with pytest.raises(DamagedCheckpointsError, match=r"start again with another training\.output_dir"):
        checkpoints.restore(abstract(small_state(1)))
    assert names(root / "checkpoints") == []
    assert names(root / "damaged") == ["1"]


def test_what_an_earlier_run_did_not_finish_is_removed(root: AnyPath) -> None:
    saved(root, 1)
    unfinished = "2" if isinstance(root, BucketPath) else "2.orbax-checkpoint-tmp"
    write_whole(root / "checkpoints" / unfinished / "default" / "manifest.0.json", "{}")
    checkpoints = opened(root)
    assert checkpoints.latest_step() == 1
    checkpoints.save(small_state(3), {})
    checkpoints.close()
    assert names(root / "checkpoints") == ["1", "3"]


def test_a_large_shard_is_cut_into_files(root: AnyPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s1jax.training.checkpoint_files._CHUNK_BYTES", 100)
    state = small_state(1, rows=36)
    checkpoints = opened(root)
    checkpoints.save(state, {})
    checkpoints.close()
    # 18 rows of 16 bytes on each device: the most that fit and divide them are 6.
    assert len(files_below(root / "checkpoints" / "1" / "default" / "params.matrix" / "c")) == 6
    checkpoints = opened(root)
    restored = checkpoints.restore(abstract(state))
    checkpoints.close()
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, restored.state, state)


def test_another_shape_is_refused_by_name(root: AnyPath) -> None:
    saved(root, 1)
    checkpoints = opened(root)
    with pytest.raises(ValueError, match=r"params\.matrix has shape \[8, 4\], expected \[10, 4\]"):
        checkpoints.restore(abstract(small_state(1, rows=10)))
    assert names(root / "checkpoints") == ["1"]


def test_cadence_by_steps_by_the_clock_and_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    by_steps, by_clock, both, never = (
        Cadence(CheckpointSection(every_steps=steps, every_minutes=minutes))
        for steps, minutes in [(3, None), (None, 0.5), (3, 0.5), (None, None)]
    )
    assert [step for step in range(1, 8) if by_steps.due(step)] == [3, 6]
    assert not any(cadence.due(1) for cadence in (by_clock, both, never))
    now = 30.0
    assert by_clock.due(1)
    assert both.due(1)
    assert not never.due(3)
    by_clock.saved()
    assert not by_clock.due(2)
    now = 60.0
    assert by_clock.due(2)
    assert [str(cadence) for cadence in (by_steps, both, never)] == [
        "a checkpoint every 3 steps",
        "a checkpoint every 3 steps and every 0.5 minutes",
        "a checkpoint only when the run is told to end",
    ]
