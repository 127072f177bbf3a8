"""Adapters beside a model's weights: what PEFT makes of ours, what we make of PEFT's, and merged ones."""

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
from safetensors.numpy import load_file, save_file

from s1jax.config import LoraSection
from s1jax.config_reader import ConfigError
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_adapter, export_model
from s1jax.model.hf import load_params
from s1jax.model.lora import Lora, lora_of
from s1jax.model.qwen import Params, Qwen
from s1jax.model.safetensors_files import CheckpointError
from tests.tiny import QWEN2, QWEN3, random_params

IDS = np.random.default_rng(1).integers(0, 368, (2, 40)).astype(np.int32)
ALL = LoraSection().targets
TARGETS = {"all": ALL, "two": ("q_proj", "down_proj")}

needs_torch = pytest.mark.skipif(sys.version_info >= (3, 12), reason="torch 2.13.0 is installed on Python 3.11 only")


def logits(model: Qwen, params: Params, ids: np.ndarray = IDS) -> np.ndarray:
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return np.asarray(model.logits(params, model.hidden_states(params, jnp.asarray(ids), jnp.asarray(positions))[0]))


def with_adapters(config: dict[str, Any], targets: tuple[str, ...] = ALL, rank: int = 6) -> tuple[Qwen, Params]:
    lora = lora_of(LoraSection(rank=rank, alpha=1, targets=targets), QwenConfig.from_hf(config))
    model = Qwen(QwenConfig.from_hf(config), dtype=jnp.float32, lora=lora, base_dtype=jnp.float32)
    return model, random_params(model)


def saved(directory: Path, model: Qwen, params: Params) -> tuple[Path, Path]:
    """The directories of the base and of its adapters."""
    base = replace(model, lora=None)
    export_model(directory / "base", base, model.split(params)[1])
    export_adapter(directory / "adapter", model, params, base=str(directory / "base"))
    return directory / "base", directory / "adapter"


def read(base: Path, model: Qwen, adapter: Path | None = None, mesh_sizes: tuple[int, int, int] = (1, 1, 1)) -> Params:
    devices = jax.devices()[: int(np.prod(mesh_sizes))]
    return load_params(base, replace(model, lora=None), make_mesh(*mesh_sizes, devices), adapter=adapter)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_merged_equals_beside(config: dict[str, Any], targets: str, tmp_path: Path) -> None:
    model, params = with_adapters(config, TARGETS[targets])
    beside = logits(model, params)
    rounding = 1e-5 * np.abs(beside).max()  # float32: the weights' sum is rounded instead of the products'
    base, adapter = saved(tmp_path, model, params)
    assert np.abs(beside - logits(replace(model, lora=None), read(base, model))).max() > 0.1
    export_model(tmp_path / "merged", model, params)
    for merged in (read(tmp_path / "merged", model), read(base, model, adapter), read(base, model, adapter, (1, 4, 2))):
        np.testing.assert_allclose(logits(replace(model, lora=None), merged), beside, rtol=0, atol=rounding)


def test_unrolled_equals_scanned() -> None:
    model, params = with_adapters(QWEN2)
    np.testing.assert_allclose(logits(model, model.unstack(params)), logits(model, params), rtol=0, atol=1e-5)


@needs_torch
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_peft_has_the_same_logits(config: dict[str, Any], targets: str, tmp_path: Path) -> None:
    model, params = with_adapters(config, TARGETS[targets])
    base, adapter = saved(tmp_path, model, params)
    np.testing.assert_allclose(logits(model, params), peft_logits(base, adapter), rtol=0, atol=2e-4)


@needs_torch
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"layers_to_transform": [0, 2]}, {"target_modules": "all-linear"}],
    ids=["plain", "rslora", "some layers", "all linear"],
)
def test_an_adapter_that_peft_made(options: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model, params = with_adapters(QWEN2)
    base, _ = saved(tmp_path, model, params)
    asked = {"r": 5, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **asked)
    )
    torch.manual_seed(0)
    for name, tensor in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS, dtype=torch.long)).logits.numpy()
    merged = read(base, model, tmp_path / "theirs")
    np.testing.assert_allclose(logits(replace(model, lora=None), merged), expected, rtol=0, atol=2e-4)


def peft_logits(base: Path, adapter: Path) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        return theirs(torch.tensor(IDS, dtype=torch.long)).logits.numpy()


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors(edit: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        content = load_file(path)
        edit(content)
        save_file(content, path)

    return change


DOWN = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (configured(use_dora=True), "use_dora is True, which is not computed here"),
        (configured(bias="all"), "bias is 'all', which is not computed here"),
        (configured(modules_to_save=["lm_head"]), "modules_to_save is"),
        (configured(rank_pattern={"q_proj": 3}), "rank_pattern is"),
        (configured(peft_type="IA3"), "expected peft_type LORA, found 'IA3'"),
        (configured(r=0), "r 0 and lora_alpha 1 are no numbers"),
        (configured(lora_alpha="x"), "are no numbers"),
        (lambda a: (a / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "adapter_config.json: "),
        (lambda a: (a / "adapter_config.json").write_text("[]"), "expected peft_type LORA, found []"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x"), "not a whole safetensors file"),
        (tensors(lambda t: t.clear()), "holds no adapter"),
        (tensors(lambda t: t.pop(f"{DOWN}.lora_A.weight")), "lora_B without its other half"),
        (tensors(lambda t: t.update({f"{DOWN}.lora_A.weight": np.ones((4, 96), np.float32)})), "which is no product"),
        (tensors(lambda t: t.update({f"{DOWN}.lora_A.weight": np.ones(4, np.float32)})), "of shape [4]"),
        (tensors(lambda t: t.update({f"{DOWN}.lora_A.weight": np.ones((6, 97), np.float32)})), "of another one"),
        (tensors(lambda t: t.update({"base_model.model.lm_head.weight": np.ones(1, np.float32)})), "unexpected tensor"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    model, params = with_adapters(QWEN2)
    base, adapter = saved(tmp_path, model, params)
    damage(adapter)
    with pytest.raises(CheckpointError) as refused:
        read(base, model, adapter)
    assert said in str(refused.value)


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path: Path) -> None:
    model, params = with_adapters({**QWEN2, "num_hidden_layers": 4})
    _, adapter = saved(tmp_path / "deeper", model, params)
    model, params = with_adapters(QWEN2)
    base, _ = saved(tmp_path / "here", model, params)
    with pytest.raises(CheckpointError, match=r"layers\.3\..*the model has no such tensor: an adapter of another one"):
        read(base, model, adapter)


@pytest.mark.parametrize(("rank", "named"), [(65, "q_proj"), (33, "k_proj"), (10**9, "q_proj")])
def test_a_rank_larger_than_a_dimension_is_refused(rank: int, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.lora\.rank: {rank}, where {named} of this model"):
        lora_of(LoraSection(rank=rank), QwenConfig.from_hf(QWEN2))


def test_parameters_are_counted() -> None:
    model, params = with_adapters(QWEN3, rank=7)
    assert isinstance(model.lora, Lora)
    counted = sum(leaf.size for leaf in jax.tree.leaves(model.split(params)[0]))
    assert model.lora.parameters(model.config) == counted
