"""The architecture of a Qwen2, Qwen2.5 or Qwen3 dense decoder, read from and written to a Hugging Face config.json.

Everything this project does not compute exactly is refused here, by name, before any weight is read.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from s1jax.config import Quantisation
from s1jax.model.config_json import Fields, UnsupportedConfigError, read_config_json, shown
from s1jax.paths import AnyPath


@dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension (arXiv 2309.00071), with the names and defaults of transformers."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class QwenConfig:
    """Sizes and switches of one decoder; the names are those of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    rope_theta: float = 10_000.0
    rope_scaling: YarnScaling | None = None
    tie_word_embeddings: bool = False
    quantisation: Quantisation | None = None
    """What the checkpoint stores the projections' weights as, if not as numbers of floating point."""

    @property
    def attention_bias(self) -> bool:
        """Qwen2 and Qwen2.5 have biases on the query, key and value projections; Qwen3 has none."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises each query and key head."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], file: str = "config.json") -> "QwenConfig":
        """Read the contents of a config.json, in the spelling of transformers 4 or 5.

        Every value that changes numbers is taken as transformers takes it, or refused. Raises UnsupportedConfigError,
        which names `file`, listing everything that is missing or not supported.
        """
        problems: list[str] = []
        fields = Fields(hf, problems)
        model_type = _model_type(hf, problems)
        sizes = {key: fields.integer(key) for key in _SIZES}
        layers = fields.integer("num_hidden_layers", most=_MOST_LAYERS)
        heads = sizes["num_attention_heads"]
        kv_heads = heads if hf.get("num_key_value_heads", 0) is None else fields.integer("num_key_value_heads")
        derived = 128 if model_type == "qwen3" else sizes["hidden_size"] // heads
        head_dim = fields.integer("head_dim") if "head_dim" in hf else derived
        rms_norm_eps = fields.number("rms_norm_eps", 1e-6)
        initializer_range = fields.number("initializer_range", 0.02)
        tie_word_embeddings = fields.boolean("tie_word_embeddings", False)
        rope_theta, rope_scaling = _rope(hf, sizes["max_position_embeddings"], problems)
        _check_layers(hf, fields, layers, problems)
        problems += _unsupported(hf, model_type)
        quantisation = _quantisation(hf, problems)
        if not problems and (heads % kv_heads or head_dim % 2 or not head_dim):
            problems.append(
                f"num_attention_heads {heads} over num_key_value_heads {kv_heads}, with head_dim {head_dim} "
                f"(hidden_size {sizes['hidden_size']}): heads must divide evenly, their size be even"
            )
        if problems:
            raise UnsupportedConfigError(file, problems)
        return cls(
            model_type=model_type,
            num_hidden_layers=layers,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=rms_norm_eps,
            initializer_range=initializer_range,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=tie_word_embeddings,
            quantisation=quantisation,
            **sizes,
        )

    @classmethod
    def from_directory(cls, directory: AnyPath) -> "QwenConfig":
        """Read `directory`/config.json; errors name the file."""
        return cls.from_hf(read_config_json(directory), str(directory / "config.json"))

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this architecture, in the spelling that transformers 4 and 5 and vLLM all read."""
        hf: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            **{key: getattr(self, key) for key in _SIZES},
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "initializer_range": self.initializer_range,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "attention_dropout": 0.0,
        }
        if self.rope_scaling:
            values = {key: value for key, value in vars(self.rope_scaling).items() if value is not None}
            hf["rope_scaling"] = {"rope_type": "yarn", **values}
        if self.quantisation:
            hf["quantization_config"] = QUANTISED[self.quantisation]
        return hf


QUANTISED: dict[Quantisation, dict[str, str]] = {
    kind: {"quant_method": "s1jax", "weights": kind} for kind in get_args(Quantisation)
}
"""The quantization_config of checkpoints that `decode.py quantise` writes."""
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
_MOST_LAYERS = 1_000
"""More are a slip of the pen, and would be built one by one."""
_UNSUPPORTED: tuple[tuple[tuple[str, ...], tuple[Any, ...], str], ...] = (
    # Keys with which transformers computes something else, the values with which it does not, and what to say.
    (("hidden_act",), ("silu",), "{key} {value} is not supported; expected 'silu'"),
    (("attention_dropout",), (0, 0.0), "{key} {value} is not supported; expected 0"),
    (("is_causal",), (True,), "{key} {value} is not supported; expected true"),
    (("is_encoder_decoder",), (False,), "{key} {value} is not supported; expected false"),
    (("num_experts", "num_local_experts"), (None, 0), "{key} = {value}: mixtures of experts are not supported"),
    (("per_layer_config", "kv_sharing_modes"), (None,), "{key}: layers that differ are not supported"),
    (("text_config", "text_encoder", "decoder", "generator"), (None,), "{key}: models in models are not supported"),
    (("configuration_files", "transformers_weights"), (None,), "{key}: no other files are read in place of the usual"),
)
_ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_YARN_KEYS = {f.name for f in dataclasses.fields(YarnScaling)}
_OTHER_ROPE_KEYS = {
    *("mscale", "mscale_all_dim", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor"),
    "mrope_section",
}
"""Of scalings that are not supported; without a scaling, transformers does not look at them."""


def _model_type(hf: Mapping[str, Any], problems: list[str]) -> str:
    model_type = hf.get("model_type")
    if isinstance(model_type, str) and model_type in _ARCHITECTURES:
        return model_type
    problems.append(f"model_type {shown(model_type)} is not supported; expected one of {list(_ARCHITECTURES)}")
    return "qwen2"


def _unsupported(hf: Mapping[str, Any], model_type: str) -> list[str]:
    """What the config asks for beyond a dense Qwen2 or Qwen3."""
    problems = [
        sentence.format(key=key, value=shown(hf[key]))
        for keys, harmless, sentence in _UNSUPPORTED
        for key in keys
        if key in hf and not any(type(hf[key]) is type(value) and hf[key] == value for value in harmless)
    ]
    # A Qwen2 has its biases whatever stands here.
    if model_type == "qwen3" and hf.get("attention_bias", False) is not False:
        problems.append("attention_bias: a Qwen3 with attention biases is not supported")
    return problems


def _quantisation(hf: Mapping[str, Any], problems: list[str]) -> Quantisation | None:
    found = hf.get("quantization_config")
    ours = next((kind for kind, entry in QUANTISED.items() if entry == found), None)
    if found is not None and ours is None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        problems.append(
            f"quantization_config: only weights quantised by decode.py quantise are supported, found quant_method "
            f"{shown(method)}; model.weights quantises the original"
        )
    return ours


def _check_layers(hf: Mapping[str, Any], fields: Fields, num_hidden_layers: int, problems: list[str]) -> None:
    """Full attention in every layer: `layer_types` says so, or without it the three keys of sliding windows."""
    sliding = fields.boolean("use_sliding_window", False) and hf.get("sliding_window", 4096) is not None
    layer_types = hf.get("layer_types")
    if layer_types is None:
        first = hf.get("max_window_layers", 28)
        if sliding and not (type(first) is int and first >= num_hidden_layers):
            problems.append(f"use_sliding_window: layers from {shown(first)} on use sliding-window attention")
    elif not isinstance(layer_types, list):
        problems.append(f"layer_types is {shown(layer_types)}, expected a list")
    elif others := [kind for kind in layer_types if kind != "full_attention"]:
        problems.append(f"layer_types: {shown(others[0])} is not supported; expected 'full_attention'")
    elif len(layer_types) != num_hidden_layers:
        problems.append(f"layer_types has {len(layer_types)} layers, num_hidden_layers is {num_hidden_layers}")


def _rope(hf: Mapping[str, Any], max_positions: int, problems: list[str]) -> tuple[float, YarnScaling | None]:
    """RoPE base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    Of both, transformers takes a `rope_scaling` that is not empty, and then nothing from `rope_parameters`.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(name), dict | None):
            problems.append(f"{name} is {shown(hf[name])}, expected an object")
            return 10_000.0, None
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    outer, fields = Fields(hf, problems), Fields(rope, problems, f"{name}: ")
    theta = fields.number("rope_theta") if "rope_theta" in rope else outer.number("rope_theta", 10_000.0)
    kind = rope["rope_type"] if "rope_type" in rope else rope.get("type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or hf.get("partial_rotary_factor") not in (None, 1.0):
        problems.append("partial_rotary_factor other than 1 is not supported")
    known = _ROPE_KEYS | _YARN_KEYS | (_OTHER_ROPE_KEYS if kind == "default" else set())
    if kind not in ("default", "yarn"):
        problems.append(f"rope_type {shown(kind)} is not supported; expected 'default' or 'yarn'")
    elif unknown := sorted(set(rope) - known):
        problems.append(f"{name}: {shown(', '.join(unknown))} not supported with {kind}")
    if kind != "yarn":
        return theta, None
    if theta == 1:
        problems.append("rope_theta is 1, which yarn has no logarithm to divide by")
    # Beside the scaling, this one wins over that in it.
    original = outer if "original_max_position_embeddings" in hf else fields
    return theta, YarnScaling(
        factor=fields.number("factor"),
        original_max_position_embeddings=original.integer("original_max_position_embeddings", max_positions),
        attention_factor=None if rope.get("attention_factor") is None else fields.number("attention_factor"),
        beta_fast=32.0 if rope.get("beta_fast") is None else fields.number("beta_fast"),
        beta_slow=1.0 if rope.get("beta_slow") is None else fields.number("beta_slow"),
        truncate=fields.boolean("truncate", True),
    )
