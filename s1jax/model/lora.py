"""Adapters among the parameters of a model."""

from dataclasses import dataclass
from typing import Any

from s1jax.config import LoraSection, LoraTarget
from s1jax.config_reader import ConfigError
from s1jax.model.config import QwenConfig


@dataclass(frozen=True)
class Lora:
    """The adapters of a model: their rank, what their products are multiplied by, and the projections that have one."""

    rank: int
    scale: float
    targets: tuple[LoraTarget, ...]

    def parameters(self, config: QwenConfig) -> int:
        """How many all of them have."""
        sizes = sum(config.hidden_size + _width(target, config) for target in self.targets)
        return config.num_hidden_layers * self.rank * sizes


Tree = dict[Any, Any]
"""Nested dicts, with anything but a dict at the leaves."""

_ADAPTER = ("lora_a", "lora_b")


def split_adapters(tree: Tree) -> tuple[Tree, Tree]:
    """The adapters of a tree like the parameters, and the rest of it."""
    adapters: Tree = {}
    rest: Tree = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            own, others = split_adapters(value)
            adapters |= {name: own} if own else {}
            rest |= {name: others} if others else {}
        else:
            (adapters if name in _ADAPTER else rest)[name] = value
    return adapters, rest


def join(one: Tree, other: Tree) -> Tree:
    """The tree that these two are parts of."""
    common = one.keys() & other.keys()
    return {**one, **other, **{name: join(one[name], other[name]) for name in common}}


def lora_of(section: LoraSection, config: QwenConfig) -> Lora | None:
    """The adapters that a configuration asks for; raises ConfigError if one would be larger than what it is beside."""
    if section.rank is None:
        return None
    for target in section.targets:
        smaller = min(config.hidden_size, _width(target, config))
        if section.rank > smaller:
            raise ConfigError(f"model.lora.rank: {section.rank}, where {target} of this model has {smaller} dimensions")
    return Lora(section.rank, section.alpha / section.rank, section.targets)


def _width(target: LoraTarget, config: QwenConfig) -> int:
    """Of a projection from or to the hidden size, the other size."""
    if target in ("q_proj", "o_proj"):
        return config.num_attention_heads * config.head_dim
    if target in ("k_proj", "v_proj"):
        return config.num_key_value_heads * config.head_dim
    return config.intermediate_size
