"""The architecture of a Qwen2, Qwen2.5 or Qwen3 dense decoder, read from and written to a Hugging Face config.json.

Everything this project does not compute exactly is refused here, by name, before any weight is read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s1jax.paths import AnyPath


class UnsupportedConfigError(ValueError):
    """A config.json that describes a model which this project would not compute exactly."""


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

    @property
    def attention_bias(self) -> bool:
        """Qwen2 and Qwen2.5 have biases on the query, key and value projections; Qwen3 has none."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises each query and key head."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "QwenConfig":
        """Read the contents of a config.json, in the spelling of transformers 4 or 5.

        Raises UnsupportedConfigError listing everything that is missing or not supported.
        """
        problems = _unsupported(hf)
        sizes = {}
        for key in _SIZES:
            value = hf.get(key)
            if key == "num_key_value_heads" and value is None:
                value = hf.get("num_attention_heads")
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                sizes[key] = value
            else:
                problems.append(f"{key} is {value!r}, expected a positive integer")
        rope_theta, rope_scaling = _rope(hf, problems)
        if problems:
            raise UnsupportedConfigError("config.json:\n" + "\n".join(f"  - {p}" for p in problems))
        head_dim = hf.get("head_dim") or (
            128 if hf["model_type"] == "qwen3" else sizes["hidden_size"] // sizes["num_attention_heads"]
        )
        if sizes["num_attention_heads"] % sizes["num_key_value_heads"] or head_dim % 2:
            raise UnsupportedConfigError(
                f"config.json: {sizes['num_attention_heads']} attention heads of size {head_dim} over "
                f"{sizes['num_key_value_heads']} key/value heads: heads must divide evenly, sizes be even"
            )
        return cls(
            model_type=hf["model_type"],
            head_dim=head_dim,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            initializer_range=float(hf.get("initializer_range", 0.02)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            **sizes,
        )

    @classmethod
    def from_directory(cls, directory: AnyPath) -> "QwenConfig":
        """Read `directory`/config.json; errors name the file."""
        return cls.from_hf(read_config_json(directory))

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this architecture, in the spelling that transformers 4 and 5 and vLLM all read."""
        hf: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            **{key: getattr(self, key) for key in _SIZES},
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
        return hf


_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_YARN_KEYS = {
    "factor": float,
    "original_max_position_embeddings": int,
    "attention_factor": float,
    "beta_fast": float,
    "beta_slow": float,
    "truncate": bool,
}


def read_config_json(directory: AnyPath) -> dict[str, Any]:
    """Parse `directory`/config.json.

    Raises FileNotFoundError or UnsupportedConfigError naming the file.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model directory holds a config.json")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(hf, dict):
        raise UnsupportedConfigError(f"{path}: expected a JSON object")
    return hf


def _unsupported(hf: Mapping[str, Any]) -> list[str]:
    """What the config asks for beyond a dense Qwen2 or Qwen3 with full attention."""
    problems = []
    model_type = hf.get("model_type")
    if model_type not in _ARCHITECTURES:
        problems.append(f"model_type {model_type!r} is not supported; expected one of {list(_ARCHITECTURES)}")
    if hf.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {hf['hidden_act']!r} is not supported; expected 'silu'")
    experts = [key for key in ("num_experts", "num_local_experts") if hf.get(key)]
    problems += [f"{key} = {hf[key]}: mixtures of experts are not supported" for key in experts]
    if hf.get("use_sliding_window") and hf.get("sliding_window"):
        first = hf.get("max_window_layers", 28)
        if first < hf.get("num_hidden_layers", 0):
            problems.append(f"use_sliding_window: layers from {first} on use sliding-window attention")
    elif "sliding_attention" in (hf.get("layer_types") or ()):
        problems.append("layer_types: sliding_attention layers are not supported")
    if model_type == "qwen3" and hf.get("attention_bias"):
        problems.append("attention_bias: a Qwen3 with attention biases is not supported")
    if hf.get("attention_dropout"):
        problems.append(f"attention_dropout {hf['attention_dropout']} is not supported; expected 0")
    if hf.get("quantization_config"):
        problems.append("quantization_config: quantised weights are not supported")
    return problems


def _rope(hf: Mapping[str, Any], problems: list[str]) -> tuple[float, YarnScaling | None]:
    """RoPE base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", None) not in (None, 1.0):
        problems.append("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        problems.append(f"rope_type {kind!r} is not supported; expected 'default' or 'yarn'")
        return float(theta), None
    unknown = sorted(set(rope) - set(_YARN_KEYS))
    if unknown:
        problems.append(f"rope_scaling: {', '.join(unknown)} not supported with yarn")
    rope.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    values = {key: cast(rope[key]) for key, cast in _YARN_KEYS.items() if rope.get(key) is not None}
    if "factor" not in values or "original_max_position_embeddings" not in values:
        problems.append("rope_scaling: yarn needs factor and original_max_position_embeddings")
        return float(theta), None
    return float(theta), YarnScaling(**values)
