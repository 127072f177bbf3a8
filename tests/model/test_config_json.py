"""config.json: every field that changes numbers is taken as transformers takes it, or refused by name."""

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from transformers import Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import RopeParameters

from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig, UnsupportedConfigError
from s1jax.model.hf import load_params
from s1jax.model.qwen import Qwen
from s1jax.model.rope import rope_frequencies
from tests.tiny import QWEN2, QWEN3

needs_torch = pytest.mark.skipif(sys.version_info >= (3, 12), reason="torch 2.13.0 is installed on Python 3.11 only")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BASES = {"qwen2": {**QWEN2, "num_hidden_layers": 2}, "qwen3": {**QWEN3, "num_hidden_layers": 2}}
BOTH = tuple(BASES)
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 8}


@dataclasses.dataclass(frozen=True)
class Honoured:
    """Changes to the base that are read; transformers computes the same, and something else than without them."""

    changes: dict[str, Any]
    models: tuple[str, ...] = BOTH
    same: bool = False
    """Whether transformers computes the same as without them after all."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """Changes that are refused; `key` is in the message."""

    changes: dict[str, Any]
    key: str = ""
    models: tuple[str, ...] = BOTH


def neutral(**changes: Any) -> Honoured:
    return Honoured(changes, same=True)


Case = Honoured | Refused

TABLE: dict[str, list[Case]] = {
    # Sizes
    "vocab_size": [Honoured({"vocab_size": 380}), Refused({"vocab_size": 0})],
    "hidden_size": [
        Honoured({"hidden_size": 32}),
        Refused({"hidden_size": 64.0}),
        Refused({"hidden_size": 3}, models=("qwen2",)),
    ],
    "intermediate_size": [Honoured({"intermediate_size": 64}), Refused({"intermediate_size": "96"})],
    "num_hidden_layers": [Honoured({"num_hidden_layers": 1}), Refused({"num_hidden_layers": 1_000_000_000})],
    "num_attention_heads": [Honoured({"num_attention_heads": 8}), Refused({"num_attention_heads": True})],
    "num_key_value_heads": [
        Honoured({"num_key_value_heads": 1}),
        Honoured({"num_key_value_heads": None}),
        Refused({"num_key_value_heads": 3}),
    ],
    "head_dim": [
        Honoured({"head_dim": 8}),
        *(Refused({"head_dim": value}) for value in (0, None, "16", -8)),
        Refused({"head_dim": 7}),
    ],
    # Attention
    "layer_types": [
        neutral(layer_types=[FULL, FULL]),
        neutral(layer_types=None),
        # It wins over the window's own keys.
        neutral(layer_types=[FULL, FULL], max_window_layers=0, **WINDOW),
        Refused({"layer_types": [FULL, SLIDING], "max_window_layers": 28, **WINDOW}, "layer_types"),
        Refused({"layer_types": [FULL, SLIDING]}),
        Refused({"layer_types": [FULL]}),
        Refused({"layer_types": FULL}),
        Refused({"layer_types": [FULL, {}]}),
    ],
    "use_sliding_window": [
        neutral(use_sliding_window=True, sliding_window=None, max_window_layers=0),
        Refused({"use_sliding_window": True, "max_window_layers": 0}),  # A window of 4,096 is the default.
        Refused({"use_sliding_window": "false"}),
        Refused({"use_sliding_window": 1}),
    ],
    "sliding_window": [
        neutral(sliding_window=8, max_window_layers=0),
        Refused({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "use_sliding_window"),
    ],
    "max_window_layers": [
        neutral(max_window_layers=2, **WINDOW),
        Refused({"max_window_layers": 1, **WINDOW}, "use_sliding_window"),
        Refused({"max_window_layers": "2", **WINDOW}, "use_sliding_window"),
    ],
    "attention_bias": [Refused({"attention_bias": True}, models=("qwen3",)), neutral(attention_bias=False)],
    "attention_dropout": [
        neutral(attention_dropout=0.0),
        Refused({"attention_dropout": 0.1}),
        Refused({"attention_dropout": "0"}),
        Refused({"attention_dropout": False}),
    ],
    "is_causal": [neutral(is_causal=True), Refused({"is_causal": False}), Refused({"is_causal": None})],
    # Norms, activations, embeddings
    "hidden_act": [Refused({"hidden_act": "gelu"}), Refused({"hidden_act": None})],
    "rms_norm_eps": [
        Honoured({"rms_norm_eps": 0.5}),
        *(
            Refused({"rms_norm_eps": value})
            for value in (0, -1e-6, None, [1e-6], {}, "1e-6", True, float("inf"), float("nan"), 10**400, 1e39, 1e-60)
        ),
    ],
    "tie_word_embeddings": [
        Honoured({"tie_word_embeddings": False}, models=("qwen2",)),
        Honoured({"tie_word_embeddings": True}, models=("qwen3",)),
        *(Refused({"tie_word_embeddings": value}) for value in ("false", 0, 1, None, [])),
    ],
    # Rotary embeddings; more of them below
    "max_position_embeddings": [
        neutral(max_position_embeddings=256),
        Honoured({"max_position_embeddings": 128, "rope_scaling": {"type": "yarn", "factor": 2.0}}),
        Refused({"max_position_embeddings": 2**31}),
    ],
    "rope_parameters": [
        Honoured({"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        Honoured({"rope_parameters": {**YARN, "rope_theta": 100.0}}),
        Refused({"rope_parameters": {FULL: {"rope_type": "default"}}}, FULL),
        Refused({"rope_parameters": []}),
    ],
    "rope_scaling": [
        Honoured({"rope_scaling": YARN}),
        Honoured({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        neutral(rope_scaling={}),
        neutral(rope_scaling=None),
        Refused({"rope_scaling": "yarn"}),
    ],
    "rope_theta": [
        Honoured({"rope_theta": 100}),
        *(Refused({"rope_theta": value}) for value in (None, 0, -1.0, "1e6", [1e6], {}, True, float("inf"), 1e39)),
    ],
    "original_max_position_embeddings": [
        Honoured({"original_max_position_embeddings": 32, "rope_scaling": YARN}),
        neutral(original_max_position_embeddings=32),
        Refused({"original_max_position_embeddings": None, "rope_scaling": YARN}),
    ],
    "partial_rotary_factor": [neutral(partial_rotary_factor=None), Refused({"partial_rotary_factor": 0.5})],
    # What another model would be
    "model_type": [*(Refused({"model_type": value}) for value in ("llama", None, [], {}, 2))],
    "is_encoder_decoder": [neutral(is_encoder_decoder=False), Refused({"is_encoder_decoder": True})],
    "per_layer_config": [Refused({"per_layer_config": {"0": {"sliding_window": 8}}})],
    "kv_sharing_modes": [Refused({"kv_sharing_modes": ["reuse", "reuse"]})],
    "quantization_config": [neutral(), Refused({"quantization_config": {"bits": 4}})],
    "num_experts": [Refused({"num_experts": 8})],
    "num_local_experts": [Refused({"num_local_experts": 8})],
    **{key: [Refused({key: {"vocab_size": 3}})] for key in ("text_config", "text_encoder", "decoder", "generator")},
    "configuration_files": [Refused({"configuration_files": ["config.4.0.0.json"]})],
    "transformers_weights": [Refused({"transformers_weights": "other.safetensors"})],
    # Nothing is computed from these, or only where no weights are read
    "initializer_range": [neutral(initializer_range=0.5), Refused({"initializer_range": "0.02"})],
    "use_cache": [neutral(use_cache=False)],
    "dtype": [neutral(dtype="float32")],
    "torch_dtype": [neutral(torch_dtype="float32")],
    "chunk_size_feed_forward": [neutral(chunk_size_feed_forward=4)],
    "output_hidden_states": [neutral(output_hidden_states=True)],
    "return_dict": [neutral(return_dict=True)],
    "pad_token_id": [neutral(pad_token_id=3)],
    "bos_token_id": [neutral(bos_token_id=3)],
    "eos_token_id": [neutral(eos_token_id=[3, 4])],
    "architectures": [neutral(architectures=["Qwen2ForCausalLM"])],
    "transformers_version": [neutral(transformers_version="4.46.1")],
    "problem_type": [neutral(problem_type="regression")],
    "id2label": [neutral(id2label={"0": "a"})],
    "label2id": [neutral(label2id={"a": 0})],
    "mlp_bias": [neutral(mlp_bias=True)],
    "attention_chunk_size": [neutral(attention_chunk_size=8)],
}
"""Of every field, and of what transformers reads beside its fields, which values are honoured and which refused."""


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {**YARN, **changes}}


ROPE_TABLE: dict[str, list[Case]] = {
    "rope_theta": [Honoured(yarn(rope_theta=100.0)), Refused(yarn(rope_theta=None)), Refused(yarn(rope_theta=1))],
    "rope_type": [Refused(yarn(rope_type="linear")), Refused(yarn(rope_type=None)), Refused(yarn(rope_type=["yarn"]))],
    "partial_rotary_factor": [Refused(yarn(partial_rotary_factor=0.5))],
    "factor": [
        Honoured(yarn(factor=2)),
        Honoured(yarn(factor=0.5)),
        *(Refused(yarn(factor=value)) for value in (None, 0, -4.0, "4", True, float("nan"))),
        Refused({"rope_scaling": {"type": "yarn"}}),
    ],
    "original_max_position_embeddings": [
        Honoured(yarn(original_max_position_embeddings=32)),
        *(Refused(yarn(original_max_position_embeddings=value)) for value in (None, 0, 64.0)),
    ],
    "attention_factor": [
        Honoured(yarn(attention_factor=0.8)),
        Honoured(yarn(attention_factor=None)),
        *(Refused(yarn(attention_factor=value)) for value in (0, "1", [])),
    ],
    "beta_fast": [Honoured(yarn(beta_fast=2.0)), Honoured(yarn(beta_fast=None)), Refused(yarn(beta_fast=0))],
    "beta_slow": [Honoured(yarn(beta_slow=0.1)), Honoured(yarn(beta_slow=None)), Refused(yarn(beta_slow="1"))],
    "truncate": [Honoured(yarn(truncate=False)), *(Refused(yarn(truncate=value)) for value in (None, "false", 0))],
    **{
        key: [Refused(yarn(**{key: 1.0})), neutral(rope_scaling={"rope_type": "default", key: 1.0})]
        for key in ("mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor")
    },
    **{key: [Refused(yarn(**{key: [1.0] * 8}))] for key in ("short_factor", "long_factor", "mrope_section")},
}
"""The same for the keys inside rope_parameters and rope_scaling."""

TABLES = [*TABLE.items(), *((f"rope-{key}", cases) for key, cases in ROPE_TABLE.items())]

HONOURED = [
    pytest.param(model, case, id=f"{model}-{key}-{number}")
    for key, cases in TABLES
    for number, case in enumerate(cases)
    if isinstance(case, Honoured)
    for model in case.models
]
REFUSED = [
    pytest.param(model, case, case.key or key.removeprefix("rope-"), id=f"{model}-{key}-{number}")
    for key, cases in TABLES
    for number, case in enumerate(cases)
    if isinstance(case, Refused)
    for model in case.models
]


@pytest.mark.parametrize("theirs", [Qwen2Config, Qwen3Config])
def test_the_table_knows_every_field_that_transformers_has(theirs: type) -> None:
    assert {field.name for field in dataclasses.fields(theirs)} <= set(TABLE)
    assert set(RopeParameters.__annotations__) <= set(ROPE_TABLE)


IDS = np.random.default_rng(0).integers(0, 368, (1, 40))


def transformers_logits(directory: Path, hf: dict[str, Any]) -> np.ndarray:
    """Write a model of this config.json, as it stands, with random weights, and have transformers read and run it.

    A tensor's values depend on nothing but its name and shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf))
    torch.set_num_threads(1)  # Beside jax in one process, two are many times slower than one.
    config = AutoConfig.from_pretrained(directory)
    tensors = {}
    for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items():
        noise = np.random.default_rng(list(name.encode())).standard_normal(tensor.shape, np.float32)
        tensors[name] = 1 + 0.2 * noise if "norm" in name else 0.15 * noise
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def our_logits(directory: Path) -> np.ndarray:
    model = Qwen(QwenConfig.from_directory(directory), dtype=jnp.float32)
    params = load_params(directory, model, make_mesh(devices=jax.devices()[:1]))
    hidden, _ = model.hidden_states(params, jnp.asarray(IDS), jnp.arange(IDS.size)[None])
    return np.asarray(model.logits(params, hidden))


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What transformers computes with the bases."""
    return {name: transformers_logits(tmp_path_factory.mktemp(name) / "model", hf) for name, hf in BASES.items()}


@needs_torch
@pytest.mark.parametrize(("base", "case"), HONOURED)
def test_what_is_read_is_computed_as_transformers_computes_it(
    base: str, case: Honoured, unchanged: dict[str, np.ndarray], tmp_path: Path
) -> None:
    hf = {**BASES[base], **case.changes}
    theirs, before = transformers_logits(tmp_path / "model", hf), unchanged[base]
    tolerance = 2e-4 * np.abs(theirs).max()
    same = theirs.shape == before.shape and np.allclose(theirs, before, rtol=0, atol=tolerance)
    assert same == case.same
    # The bases themselves are run in test_parity.py.
    if not (same and QwenConfig.from_hf(hf) == QwenConfig.from_hf(BASES[base])):
        np.testing.assert_allclose(our_logits(tmp_path / "model"), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("base", "case", "key"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(base: str, case: Refused, key: str) -> None:
    with pytest.raises(UnsupportedConfigError) as error:
        QwenConfig.from_hf({**BASES[base], **case.changes}, "some/config.json")
    line = str(error.value)
    assert line.startswith("some/config.json: ")
    assert key in line
    assert "\n" not in line


# Values of the wrong kind anywhere, and numbers at their edges


NUMBERS = st.integers(-2, 5) | st.floats() | st.sampled_from([0.1, 1.0, 64, 10_000.0, 10**400])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def refusal(hf: dict[str, Any]) -> str | None:
    """What is said of a config that is refused."""
    try:
        QwenConfig.from_hf(hf)
    except UnsupportedConfigError as error:
        return str(error)
    return None


@given(key=st.sampled_from(sorted(TABLE)), value=JSON, base=st.sampled_from(BOTH))
def test_any_value_of_any_key_is_read_or_refused_by_name(key: str, value: Any, base: str) -> None:
    refused = refusal({**BASES[base], key: value})
    if refused is not None:
        assert key in refused or (key in ("sliding_window", "max_window_layers") and "use_sliding_window" in refused)
        assert "\n" not in refused


ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "yarn"]),
        "type": st.sampled_from(["default", "yarn"]),
        "rope_theta": st.sampled_from([50.0, 10_000]),
        "factor": st.sampled_from([0.5, 1, 4.0]),
        "original_max_position_embeddings": st.sampled_from([16, 64, 512]),
        "attention_factor": st.sampled_from([None, 0.5]),
        "beta_fast": st.sampled_from([None, 8, 0.5]),
        "beta_slow": st.sampled_from([None, 2]),
        "truncate": st.booleans(),
    },
)


@needs_torch
@given(
    rope=st.fixed_dictionaries(
        {},
        optional={
            "rope_parameters": ROPE,
            "rope_scaling": ROPE,
            "rope_theta": st.sampled_from([100, 500.0]),
            "original_max_position_embeddings": st.sampled_from([32, 128]),
            "max_position_embeddings": st.sampled_from([256, 512]),
        },
    ),
    base=st.sampled_from(BOTH),
)
def test_any_two_spellings_of_rope_turn_by_the_angles_of_transformers(rope: dict[str, Any], base: str) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    hf = {**{key: value for key, value in BASES[base].items() if key != "rope_theta"}, **rope}
    if (refused := refusal(hf)) is not None:
        assert "factor is missing" in refused
        return
    frequencies, magnitude = rope_frequencies(QwenConfig.from_hf(hf))
    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[base](**copy.deepcopy(hf))
    theirs = {"qwen2": Qwen2RotaryEmbedding, "qwen3": Qwen3RotaryEmbedding}[base](config)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
    assert magnitude == pytest.approx(theirs.attention_scaling)
