"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, of one model's projections.

One that is read is merged: while a weight is loaded, its rows get what the adapter adds to them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np

from s1jax.config import LoraTarget
from s1jax.model.hf_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from s1jax.model.hf_names import TensorLayout
from s1jax.model.lora import Lora
from s1jax.model.safetensors_files import FLOATS, CheckpointError, StoredTensor, read_header
from s1jax.paths import AnyPath
from s1jax.strict_json import parse_json

_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(.*)\.lora_(A|B)\.weight")
_MUST_BE_OFF = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "lora_bias": False,
    "alora_invocation_tokens": None,
}
"""What makes an adapter more than a product that is added to a weight, and what PEFT writes where it is not so."""


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of a checkpoint with what an adapter adds; read like a `StoredTensor`, in float32."""

    stored: StoredTensor
    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs)."""
        return self.stored.shape

    @property
    def row_bytes(self) -> int:
        """Of one index of the first dimension."""
        return 4 * self.shape[1]

    @cached_property
    def _a(self) -> np.ndarray:
        return self.a.read_rows(0, self.a.shape[0]).astype(np.float32)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows from `start` up to `stop`, as `StoredTensor.read_rows`."""
        rows = self.scale * self.b.read_rows(start, stop).astype(np.float32) @ self._a
        rows += self.stored.read_rows(start, stop).astype(np.float32)
        return rows


def read_adapter(directory: AnyPath, checkpoint: Mapping[str, StoredTensor]) -> dict[str, MergedTensor]:
    """The tensors of a checkpoint that an adapter changes, by their names. Of the adapter only the headers are read.

    Raises CheckpointError with all that is wrong with the adapter, or with its place on this checkpoint.
    """
    scale = _scale(directory, _read_config(directory))
    try:
        tensors = read_header(directory / ADAPTER_WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError(directory, [f"no {ADAPTER_WEIGHTS}"]) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(directory, [f"{ADAPTER_WEIGHTS}: not a whole safetensors file ({error})"]) from None
    problems, halves = [], dict[str, dict[str, StoredTensor]]()
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None or match[1].rpartition(".")[2] not in get_args(LoraTarget):
            problems.append(f"unexpected tensor {name:.200}")
        elif tensor.dtype not in FLOATS or len(tensor.shape) != 2 or 0 in tensor.shape:
            problems.append(f"{name:.200} is {tensor.dtype:.40} of shape {list(tensor.shape)}")
        else:
            halves.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
    merged = {}
    for name, half in halves.items():
        if problem := _misfit(half, checkpoint.get(name)):
            problems.append(f"{name:.200}: {problem}")
        else:
            merged[name] = MergedTensor(checkpoint[name], half["A"], half["B"], scale)
    if problems or not merged:
        raise CheckpointError(directory, problems or [f"{ADAPTER_WEIGHTS}: holds no adapter"])
    return merged


def _misfit(half: dict[str, StoredTensor], weight: StoredTensor | None) -> str | None:
    """What is wrong with a pair of matrices, and with the weight that they are for."""
    if len(half) < 2:
        return f"lora_{next(iter(half))} without its other half"
    a, b = half["A"].shape, half["B"].shape
    if a[0] != b[1]:
        return f"lora_A has shape {list(a)} and lora_B {list(b)}, which is no product"
    if weight is None:
        return "the model has no such tensor: an adapter of another one"
    if weight.shape != (b[0], a[1]):
        return f"shape {[b[0], a[1]]} by the adapter, {list(weight.shape)} in the model: an adapter of another one"
    return None


def _read_config(directory: AnyPath) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(directory, [f"no {ADAPTER_CONFIG}: not an adapter that PEFT wrote"]) from None
    except ValueError as error:
        raise CheckpointError(directory, [f"{ADAPTER_CONFIG}: {error}"]) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise CheckpointError(directory, [f"{ADAPTER_CONFIG}: expected peft_type LORA, found {found!r:.40}"])
    problems = [
        f"{ADAPTER_CONFIG}: {key} is {config[key]!r:.100}, which is not computed here"
        for key, off in _MUST_BE_OFF.items()
        if config.get(key) not in (None, off, [])
    ]
    if problems:
        raise CheckpointError(directory, problems)
    return config


def _scale(directory: AnyPath, config: dict[str, Any]) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(
            directory, [f"{ADAPTER_CONFIG}: r {rank!r:.40} and lora_alpha {alpha!r:.40} are no numbers"]
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def adapter_layouts(layouts: list[TensorLayout], lora: Lora) -> list[TensorLayout]:
    """How PEFT calls and stores the adapters of a model whose stacked parameters have these layouts."""
    halves = []
    for layout in layouts:
        if layout.name.removesuffix(".weight").rpartition(".")[2] not in lora.targets:
            continue
        outputs, inputs = layout.groups
        name = f"{_PREFIX}{layout.name.removesuffix('.weight')}.lora_{{}}.weight"
        # Ours are (inputs, rank) and (rank, outputs).
        a = ((len(inputs),), tuple(range(len(inputs))))
        b = (tuple(range(1, 1 + len(outputs))), (0,))
        for half, groups in (("A", a), ("B", b)):
            path = (*layout.path[:-1], f"lora_{half.lower()}")
            halves.append(TensorLayout(path, name.format("{}", half), groups))
    return halves


def adapter_config(lora: Lora, base: str) -> str:
    """The adapter_config.json of adapters beside the model that is called so."""
    alpha = lora.scale * lora.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2) + "\n"
