"""Weights of integers: how they are made, their products, and models that are read with them."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from s1jax.config import ModelSection, Quantisation, QuantiseConfig, QuantisedModelSection
from s1jax.config_reader import ConfigError, load_config
from s1jax.decoding import quantise as command
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.config_json import UnsupportedConfigError
from s1jax.model.export import export_model, export_quantised
from s1jax.model.hf import load_params
from s1jax.model.load import decoding_model
from s1jax.model.lora import join
from s1jax.model.projection import project
from s1jax.model.quantisation import from_stored, quantise, stored_integers, to_stored
from s1jax.model.qwen import Params, Qwen
from s1jax.model.safetensors_files import CheckpointError, read_header
from s1jax.training.config import TrainConfig
from s1jax.training.loop import training_model
from tests.model.test_adapter import logits, saved, with_adapters
from tests.reference import quantisation as reference
from tests.tiny import QWEN2, QWEN3, model_directory

KINDS: tuple[Quantisation, ...] = ("int8", "int4")
numbers = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_integers_are_the_nearest_and_the_greatest_is_exact(kind: Quantisation, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 24, 32, 96, 128, 160, 256])))
    rows = data.draw(arrays(np.float32, shape, elements=numbers))
    integers, scales = quantise(rows, kind)
    expected, of_groups = reference.quantise(rows, kind)
    assert integers.dtype == jnp.dtype(kind)
    np.testing.assert_allclose(scales, of_groups, rtol=1e-6)
    # Half-way between two, either may be taken: float32 and float64 differ.
    assert np.abs(integers.astype(int) - expected).max() <= 1
    errors = np.abs(reference.widened(integers.astype(int), scales) - rows)
    assert (errors <= np.repeat(scales, shape[1] // scales.shape[1], axis=1) * 0.50001).all()


def inputs_first(array: np.ndarray, inputs: tuple[int, ...]) -> np.ndarray:
    """(outputs, inputs) as a stacked projection has it."""
    return array.T.reshape(*inputs, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 1), (2, 5), (5, 20)])
@pytest.mark.parametrize("inputs", [(128,), (4, 96), (40,), (5, 24), (1024,), (7, 128)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_what_the_integers_stand_for(
    kind: Quantisation, outputs_first: bool, rows: tuple[int, ...], inputs: tuple[int, ...], dtype: Any
) -> None:
    rng = np.random.default_rng(0)
    size = int(np.prod(inputs))
    integers, scales = quantise(rng.normal(size=(45, size)).astype(np.float32), kind)
    x = jnp.asarray(rng.normal(size=(*rows, *inputs)), dtype)
    matrix, wide = np.asarray(x, np.float64).reshape(*rows, size), reference.widened(integers.astype(int), scales).T
    exact = matrix @ wide
    weight = integers.reshape(45, *inputs) if outputs_first else inputs_first(integers, inputs)
    scale = scales if outputs_first else scales.T
    product = jax.jit(partial_project(len(inputs), outputs_first))(x, jnp.asarray(weight), jnp.asarray(scale))
    assert product.dtype == dtype
    if dtype == jnp.float32:
        np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-4)
    else:
        # The sum is rounded once, and of four bits each weight times its scale, or the sum of each group.
        bound = 2**-8 * np.abs(exact) + 2**-9 * (np.abs(matrix) @ np.abs(wide)) + 1e-4
        assert (np.abs(np.asarray(product, np.float64) - exact) <= bound).all()


@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_integers_may_be_more_than_float16_has(kind: Quantisation, outputs_first: bool) -> None:
    rows = np.full((3, 256), 0.001, np.float32)
    weight, scale = (jnp.asarray(a if outputs_first else a.T) for a in quantise(rows, kind))
    x = jnp.full((2, 256), 300, jnp.float16)
    product = jax.jit(partial_project(1, outputs_first))(x, weight, scale)
    np.testing.assert_allclose(product, np.full((2, 3), 256 * 0.3), rtol=2**-10)


@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(1,), (2, 5)])
def test_gradients_by_activations_are_those_of_what_the_integers_stand_for(
    kind: Quantisation, outputs_first: bool, rows: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    integers, scales = quantise(rng.normal(size=(45, 128)).astype(np.float32), kind)
    x, of_product = (jnp.asarray(rng.normal(size=(*rows, size)), jnp.float32) for size in (128, 45))
    expected = np.asarray(of_product) @ reference.widened(integers.astype(int), scales)
    weight, scale = (jnp.asarray(a if outputs_first else a.T) for a in (integers, scales))
    _, gradients = jax.vjp(lambda x: partial_project(1, outputs_first)(x, weight, scale), x)
    np.testing.assert_allclose(gradients(of_product)[0], expected, rtol=1e-5, atol=1e-4)


def partial_project(inputs: int, outputs_first: bool) -> Callable[..., jax.Array]:
    return lambda x, weight, scale: project(x, weight, scale, inputs=inputs, outputs_first=outputs_first)


def read(directory: Path, model: Qwen, sizes: tuple[int, int, int] = (1, 1, 1), **more: Any) -> Params:
    return load_params(directory, model, make_mesh(*sizes, jax.devices()[: int(np.prod(sizes))]), **more)


def float_model(config: dict[str, Any], **more: Any) -> Qwen:
    return Qwen(QwenConfig.from_hf(config), dtype=jnp.float32, **more)


def stand_in(directory: Path, to: Path, kind: Quantisation, config: dict[str, Any]) -> Path:
    """The directory of a model whose weights are what the integers of this one stand for."""
    model_directory(to, config)
    tensors = load_file(directory / "model.safetensors")
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    for name in (n for n in tensors if n.endswith("_proj.weight") or n in tables):
        integers, scales = quantise(tensors[name].astype(np.float32), "int8" if name in tables else kind)
        tensors[name] = reference.widened(integers.astype(int), scales).astype(np.float32)
    save_file(tensors, to / "model.safetensors")
    return to


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_a_model_computes_what_its_integers_stand_for(
    kind: Quantisation, config: dict[str, Any], tmp_path: Path
) -> None:
    directory = model_directory(tmp_path / "model", config)
    expected = logits(
        float_model(config), read(stand_in(directory, tmp_path / "wide", kind, config), float_model(config))
    )
    model = float_model(config, quantisation=kind)
    for stacked in (True, False):
        found = logits(model, read(directory, model, stacked=stacked))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=f"{stacked=}")
    params = read(directory, model)
    assert params["layers"]["attention"]["query"]["weight"].dtype == jnp.dtype(kind)
    assert params["embedding"]["weight"].dtype == params[model.head_name]["weight"].dtype == jnp.int8
    original = logits(float_model(config), read(directory, float_model(config)))
    assert np.abs(original - expected).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 8, 2), (2, 2, 4)])
def test_every_mesh_has_the_same_integers(kind: Quantisation, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    config = {**QWEN2, "num_attention_heads": 8, "num_key_value_heads": 4}
    directory, model = model_directory(tmp_path / "model", config), float_model(config, quantisation=kind)
    for stacked in (True, False):
        whole, spread = (read(directory, model, mesh, stacked=stacked) for mesh in ((1, 1, 1), sizes))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), whole, spread)
        with jax.set_mesh(make_mesh(*sizes)):
            found = logits(model, spread)
        np.testing.assert_allclose(found, logits(model, whole), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_before_and_trained_beside(kind: Quantisation, tmp_path: Path) -> None:
    beside, params = with_adapters(QWEN2)
    base, adapter = saved(tmp_path, beside, params)
    model = replace(beside, lora=None, quantisation=kind)
    merged = logits(model, read(base, model, adapter=adapter))
    with_base = replace(beside, quantisation=kind)
    run_time = logits(with_base, join(read(base, model), beside.split(params)[0]))
    expected = logits(beside, params)
    export_model(tmp_path / "merged", with_base, join(read(base, model), beside.split(params)[0]), dtype=jnp.float32)
    exported = logits(replace(model, quantisation=None), read(tmp_path / "merged", replace(model, quantisation=None)))
    np.testing.assert_allclose(exported, run_time, rtol=0, atol=1e-4)
    # Both are near what they stand for, and neither is the base without the adapter.
    far = np.abs(logits(model, read(base, model)) - expected).mean()
    assert np.abs(merged - expected).mean() < far
    assert np.abs(run_time - expected).mean() < far


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_is_named(kind: Quantisation, tmp_path: Path) -> None:
    directory, name = model_directory(tmp_path / "model"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(directory / "model.safetensors")
    tensors[name][3, 5] = np.nan
    save_file(tensors, directory / "model.safetensors")
    model = float_model(QWEN2, quantisation=kind)
    with pytest.raises(CheckpointError, match=f"NaN or infinite weights in {name}"):
        read(directory, model)


@pytest.mark.parametrize("kind", KINDS)
def test_random_integers_have_the_spread_of_random_weights(kind: Quantisation) -> None:
    wide, model = float_model(QWEN2), float_model(QWEN2, quantisation=kind)
    gate = model.init(jax.random.key(0))["layers"]["mlp"]["gate"]
    values = np.asarray(gate["weight"], np.float32) * np.asarray(gate["scale"][0, 0, 0])
    expected = np.asarray(wide.init(jax.random.key(0))["layers"]["mlp"]["gate"]["weight"])
    assert values.std() == pytest.approx(expected.std(), rel=0.2)


def quantised(directory: Path, to: Path, kind: Quantisation, **more: Any) -> Path:
    """What `decode.py quantise` makes of a directory."""
    command.quantise(QuantiseConfig(QuantisedModelSection(str(directory), kind, **more), str(to)))
    return to


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{**QWEN2, "num_attention_heads": 8, "num_key_value_heads": 4}, QWEN3])
def test_what_is_written_once_is_read_as_what_is_made_while_reading(
    kind: Quantisation, config: dict[str, Any], tmp_path: Path
) -> None:
    directory = model_directory(tmp_path / "model", config)
    stored = quantised(directory, tmp_path / "quantised", kind)
    assert (stored / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    model = float_model(config, quantisation=kind)
    again = decoding_model(ModelSection(str(stored), dtype="float32"), QwenConfig.from_directory(stored))
    for sizes in ((1, 1, 1), (2, 2, 2)):
        for stacked in (True, False):
            expected, found = (read(d, m, sizes, stacked=stacked) for d, m in ((directory, model), (stored, again)))
            jax.tree.map(same_bits, expected, found)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_quantised_directory_are_whole_and_for_nobody_else(kind: Quantisation, tmp_path: Path) -> None:
    beside, params = with_adapters(QWEN2)
    base, adapter = saved(tmp_path, beside, params)
    model = replace(beside, lora=None, quantisation=kind)
    stored = tmp_path / "quantised"
    export_quantised(stored, base, kind, adapter=adapter, max_file_bytes=20_000)
    files = sorted(stored.glob("model-*.safetensors"))
    index = json.loads((stored / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    again = replace(model, config=QwenConfig.from_directory(stored))
    jax.tree.map(same_bits, read(base, model, adapter=adapter), read(stored, again))
    with pytest.raises(CheckpointError, match="already exists"):
        export_quantised(stored, base, kind)
    if sys.version_info < (3, 12):
        from transformers import AutoModelForCausalLM

        with pytest.raises(RuntimeError, match="mismatched"):
            AutoModelForCausalLM.from_pretrained(stored)
    files[1].rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=f"{files[1].name}: no such file"):
        read(stored, again)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_directory_is_the_base_of_adapters_and_is_exported_widened(
    kind: Quantisation, tmp_path: Path
) -> None:
    beside, params = with_adapters(QWEN2)
    base, _ = saved(tmp_path, beside, params)
    stored = quantised(base, tmp_path / "quantised", kind)
    with_base = replace(beside, quantisation=kind)
    again = replace(with_base, config=QwenConfig.from_directory(stored))
    frozen = read(stored, again)
    jax.tree.map(same_bits, read(base, with_base), frozen)
    trained = join(frozen, beside.split(params)[0])
    export_model(tmp_path / "merged", again, trained, source=stored, dtype=jnp.float32)
    merged = Qwen(QwenConfig.from_directory(tmp_path / "merged"), dtype=jnp.float32)
    assert merged.config == beside.config
    np.testing.assert_allclose(
        logits(merged, read(tmp_path / "merged", merged)), logits(again, trained), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("inputs", [1, 2, 7, 128])
def test_two_integers_of_four_bits_share_a_byte(inputs: int, tmp_path: Path) -> None:
    integers = np.random.default_rng(0).integers(-7, 8, (5, inputs)).astype(jnp.int4)
    save_file({"x": to_stored(integers)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["x"]
    assert (stored.shape, stored.dtype) == (stored_integers("int4", integers.shape).shape, "U8")
    assert stored.row_bytes == -(-inputs // 2)
    found = from_stored(stored, "int4", integers.shape)
    for start, stop in ((0, 5), (2, 4)):
        assert found.read_rows(start, stop).tobytes() == integers[start:stop].tobytes()


def same_bits(one: jax.Array, other: jax.Array) -> None:
    assert one.dtype == other.dtype
    assert one.sharding == other.sharding
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_what_needs_the_original_weights_is_refused(tmp_path: Path) -> None:
    directory = quantised(model_directory(tmp_path / "model"), tmp_path / "int8", "int8")
    config = QwenConfig.from_directory(directory)
    with pytest.raises(ConfigError, match=r"^model\.weights: the model's weights are int8 already"):
        decoding_model(ModelSection(str(directory), weights="int4"), config)
    with pytest.raises(ConfigError, match=r"^model\.adapter: the model's weights are int8 already"):
        decoding_model(ModelSection(str(directory), adapter="x"), config)
    with pytest.raises(ConfigError, match=r"^model\.weights: "):
        quantised(directory, tmp_path / "int4", "int4")
    assert not (tmp_path / "int4").exists()
    words = [f"model.path={directory}", "data.path=x", "training.output_dir=y"]
    with pytest.raises(ConfigError, match="of which only adapters can be trained"):
        training_model(load_config(TrainConfig, words), config)
    words += ["model.lora.rank=4"]
    assert training_model(load_config(TrainConfig, words), config).quantisation == "int8"
    with pytest.raises(ConfigError, match=r"^model\.base_dtype: the model's weights are int8 already"):
        training_model(load_config(TrainConfig, [*words, "model.base_dtype=bfloat16"]), config)
    for method in ("gptq", "awq", "bitsandbytes", "fp8"):
        with pytest.raises(UnsupportedConfigError, match=f"found quant_method '{method}'"):
            QwenConfig.from_hf({**QWEN2, "quantization_config": {"quant_method": method, "bits": 4}})


def test_a_source_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    directory, name = model_directory(tmp_path / "model"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(directory / "model.safetensors")
    tensors[name][3, 5] = np.nan
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"NaN or infinite weights in {name}"):
        quantised(directory, tmp_path / "int4", "int4")
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".int4.lock"}
