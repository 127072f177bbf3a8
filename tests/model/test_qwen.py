"""One model, many ways to run it: scanned or not, rematerialised or not, cached or not, on any mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from s1jax.mesh import MeshError, make_mesh, partition_spec
from s1jax.model import token_logprobs as token_logprobs_module
from s1jax.model.config import QwenConfig
from s1jax.model.qwen import Qwen
from s1jax.model.token_logprobs import token_logprobs
from tests.tiny import QWEN2, QWEN3, random_params

WIDE = {**QWEN2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {"qwen2": WIDE, "qwen3": {**QWEN3, "num_attention_heads": 8, "num_key_value_heads": 4}}
MESHES = {"8x2": (1, 8, 2), "2x8": (1, 2, 8), "16x1": (1, 16, 1), "4x4": (1, 4, 4), "2x4x2": (2, 4, 2)}


def build(name: str, **options) -> Qwen:
    return Qwen(QwenConfig.from_hf(CONFIGS[name]), dtype=jnp.float32, **options)


def packed_batch(rows: int = 16, length: int = 32, seed: int = 0) -> list[jax.Array]:
    """Rows of two examples and some padding: input ids, positions, segment ids."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(0, 368, (rows, length))
    positions, segments = np.zeros((2, rows, length), int)
    for row in range(rows):
        first = rng.integers(4, length - 8)
        last = length - rng.integers(0, 4)
        positions[row, :last] = [*range(first), *range(last - first)]
        segments[row, :first], segments[row, first:last] = 1, 2
    return [jnp.asarray(x) for x in (input_ids, positions, segments)]


def loss_and_gradients(model: Qwen, params, batch, mesh=None):
    """Mean of the log-probabilities of the next tokens, with its gradients."""
    input_ids, positions, segment_ids = batch

    @jax.jit
    def run(params):
        def loss(params):
            hidden, _ = model.hidden_states(params, input_ids, positions, segment_ids)
            logprobs, _ = token_logprobs(model, params, hidden, jnp.roll(input_ids, -1, 1))
            return jnp.mean(logprobs * (segment_ids > 0))

        return jax.value_and_grad(loss)(params)

    if mesh is None:
        return jax.device_get(run(params))
    with jax.set_mesh(mesh):
        return jax.device_get(run(params))


def assert_close(a, b) -> None:
    """Equal to 1e-5 of the largest value of each array."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1e-3, float(np.abs(y).max())))


@pytest.fixture(scope="module", params=CONFIGS)
def one_device(request):
    """Loss and gradients on one device, scanned, nothing rematerialised."""
    model = build(request.param)
    params = random_params(model)
    return request.param, params, loss_and_gradients(model, params, packed_batch())


@pytest.mark.parametrize("remat", ["full", "gate", "heads", "offload", "dots"])
def test_rematerialisation_changes_nothing(one_device, remat: str) -> None:
    name, params, expected = one_device
    assert_close(loss_and_gradients(build(name, remat=remat), params, packed_batch()), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_remat_keeps_less(name: str) -> None:
    """Of layers enough that what they keep is more than what one of them computes with."""
    config, batch = QwenConfig.from_hf({**CONFIGS[name], "num_hidden_layers": 8}), packed_batch(2, 256)

    def temporaries(remat: str) -> int:
        model = Qwen(config, dtype=jnp.float32, remat=remat)

        def loss(params):
            return jnp.mean(model.hidden_states(params, *batch)[0])

        params = random_params(model)
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < temporaries("gate") < temporaries("dots") < temporaries("none")
    assert temporaries("gate") < temporaries("heads") < temporaries("none")


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolled_equals_scanned(one_device, remat: str) -> None:
    name, params, (loss, gradients) = one_device
    model = build(name, remat=remat)
    unrolled_loss, unrolled = loss_and_gradients(model, model.unstack(params), packed_batch())
    assert_close((unrolled_loss, unrolled), (loss, model.unstack(jax.tree.map(jnp.asarray, gradients))))


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_equals_one_device(one_device, mesh: str) -> None:
    name, params, expected = one_device
    model, devices = build(name, remat="full"), make_mesh(*MESHES[mesh])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params(devices))
    sharded = jax.device_put(params, shardings)
    assert_close(loss_and_gradients(model, sharded, packed_batch(), devices), expected)


def test_packed_gradients_equal_those_of_separate_examples(one_device) -> None:
    name, params, _ = one_device
    model = build(name)
    input_ids, positions, segments = (np.asarray(x) for x in packed_batch(2))

    @jax.jit
    def gradients(params, input_ids, positions, segment_ids, targets, weights):
        def loss(params):
            hidden, _ = model.hidden_states(params, input_ids, positions, segment_ids)
            return jnp.sum(token_logprobs(model, params, hidden, targets)[0] * weights)

        return jax.grad(loss)(params)

    targets = np.roll(input_ids, -1, 1)
    weights = ((segments > 0) & (np.roll(segments, -1, 1) == segments)).astype(np.float32)
    packed = gradients(params, input_ids, positions, segments, targets, weights)
    total = jax.tree.map(np.zeros_like, packed)
    for row in range(2):
        for segment in (1, 2):
            chosen = segments[row] == segment
            # Padded to one length, so that one compilation serves: the padding is alone in segment 0.
            one = [
                np.pad(x[row, chosen], (0, 32 - chosen.sum()))[None]
                for x in (input_ids, positions, segments, targets, weights)
            ]
            total = jax.tree.map(np.add, total, gradients(params, *one))
    assert_close(packed, total)


def test_a_cache_filled_in_pieces_gives_the_same_hidden_states(one_device) -> None:
    name, params, _ = one_device
    model = build(name)
    rng = np.random.default_rng(3)
    input_ids = rng.integers(0, 368, (3, 20))
    whole, _ = model.hidden_states(params, jnp.asarray(input_ids), jnp.tile(jnp.arange(20), (3, 1)))
    starts = np.array([4, 9, 12])
    unrolled = model.unstack(params)
    table = jnp.array([[3], [1], [2]])
    step = jax.jit(
        lambda ids, positions, cache: model.hidden_states(unrolled, ids, positions, cache=cache, page_table=table)
    )
    # The shorter rows' padding is written too, and overwritten token by token.
    prompts = np.where(np.arange(12) < starts[:, None], input_ids[:, :12], 0)
    hidden, cache = step(prompts, np.tile(np.arange(12), (3, 1)), model.init_cache(4))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(hidden[row, :start], whole[row, :start], rtol=0, atol=1e-5)
    for offset in range(8):
        at = (starts + offset)[:, None]
        hidden, cache = step(np.take_along_axis(input_ids, at, 1), at, cache)
        np.testing.assert_allclose(hidden, np.take_along_axis(whole, at[..., None], 1), rtol=0, atol=1e-5)


def test_with_an_int8_cache_prefill_and_decoding_see_the_same_and_almost_what_was_there(one_device) -> None:
    name, params, _ = one_device
    exact = build(name)
    model, unrolled = replace(exact, cache_dtype="int8"), exact.unstack(params)
    input_ids = np.random.default_rng(3).integers(0, 368, (3, 20))
    positions, table = np.tile(np.arange(20), (3, 1)), jnp.array([[3], [1], [2]])

    @jax.jit
    def run(ids, positions, cache):
        return model.hidden_states(unrolled, ids, positions, cache=cache, page_table=table)

    whole, at_once = run(input_ids, positions, model.init_cache(4))
    hidden, cache = run(input_ids[:, :12], positions[:, :12], model.init_cache(4))
    parts = [hidden]
    for at in range(12, 20):
        hidden, cache = run(input_ids[:, at : at + 1], positions[:, at : at + 1], cache)
        parts.append(hidden)
    # Sums in another order may put a number on the other side of a half: to the next integer, and what follows differs.
    pairs = [(x, y) for x, y in zip(jax.tree.leaves(at_once), jax.tree.leaves(cache), strict=True) if x.ndim == 4]
    steps = np.stack([abs(x.astype(int) - y.astype(int))[:, table[:, 0], :20] for x, y in pairs])
    assert steps.max() <= 1
    assert steps.mean() < 0.01
    alike = ~np.logical_or.accumulate(steps.any(axis=(0, 1, 4)), axis=1)
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[alike], whole[alike], rtol=0, atol=1e-5)
    plain, _ = exact.hidden_states(params, jnp.asarray(input_ids), jnp.asarray(positions))
    logits, right = exact.logits(params, whole), exact.logits(params, plain)
    assert 1e-4 < jnp.linalg.norm(logits - right) / jnp.linalg.norm(right) < 2e-2


def test_a_cache_takes_unrolled_parameters_only(one_device) -> None:
    name, params, _ = one_device
    model = build(name)
    ids = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="parameters that are unrolled"):
        model.hidden_states(params, ids, ids, cache=model.init_cache(2))


def test_chunked_logprobs_equal_the_log_softmax_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3")
    params = random_params(model)
    hidden = jax.random.normal(jax.random.key(0), (2, 13, 64))
    targets = np.random.default_rng(0).integers(0, 368, (2, 13))
    monkeypatch.setattr(token_logprobs_module, "_LOGITS_PER_CHUNK", 4 * 2 * 384 + 1)
    logprobs, best = token_logprobs(model, params, hidden, jnp.asarray(targets))
    everything = jax.nn.log_softmax(model.logits(params, hidden), axis=-1)
    np.testing.assert_allclose(
        logprobs, np.take_along_axis(np.asarray(everything), targets[..., None], -1)[..., 0], atol=1e-5
    )
    np.testing.assert_array_equal(best, everything.argmax(-1))


def test_fresh_parameters_are_the_same_on_any_mesh() -> None:
    model, mesh = build("qwen2"), make_mesh(1, 8, 2)
    fresh, sharded = model.init(jax.random.key(0)), model.init(jax.random.key(0), mesh)
    jax.tree.map(np.testing.assert_array_equal, fresh, sharded)
    assert jax.tree.map(lambda x: x.sharding, sharded) == jax.tree.map(
        lambda x: x.sharding, model.abstract_params(mesh)
    )
    assert float(jnp.std(fresh["embedding"]["weight"])) == pytest.approx(0.02, rel=0.05)


def test_the_logical_axis_table() -> None:
    sizes = {"data": 2, "fsdp": 4, "tensor": 2}
    assert partition_spec(("embed", "heads", "head_dim"), (64, 8, 8), sizes) == P("fsdp", "tensor", None)
    assert partition_spec(("batch", "length"), (16, 32), sizes) == P(("data", "fsdp"), None)
    # One key/value head on two tensor shards is held by both.
    assert partition_spec(("embed", "kv_heads", "head_dim"), (64, 1, 8), sizes) == P("fsdp", None, None)
    with pytest.raises(MeshError, match="'heads' and 'mlp' are both on the mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"), (8, 8), sizes)
    with pytest.raises(MeshError, match="'heads' has size 7, which tensor = 2 does not divide"):
        partition_spec(("embed", "heads", "head_dim"), (64, 7, 8), sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 3, 1), "1x3x1 .* does not match the 16 devices"),
        ((-1, -1, 1), "at most one is -1"),
        ((0, 16, 1), "sizes are positive"),
        ((1, -1, 3), "does not match the 16 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(MeshError, match=message):
        make_mesh(*sizes)
