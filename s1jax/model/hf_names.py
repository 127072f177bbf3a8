"""How each parameter is called and laid out in a Hugging Face checkpoint: the one table for reading and writing.

A Hugging Face tensor, its merged dimensions split, is one of our arrays with the dimensions in another order: a
projection that they store as (heads * head_dim, hidden) is (hidden, heads, head_dim) here where layers are stacked.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np

from s1jax.config import Quantisation
from s1jax.model.config import QwenConfig

Index = tuple[slice, ...]


@dataclass(frozen=True)
class TensorLayout:
    """One parameter (of every layer, if `name` has a placeholder) and its Hugging Face tensor.

    `groups` are our dimensions in the order in which the tensor stores them, those that it merges in one group.
    """

    path: tuple[str | int, ...]
    name: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def per_layer(self) -> bool:
        """Whether each layer has such a tensor, and ours is the stack of them."""
        return "{}" in self.name

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the stored tensor, given the shape of one layer's parameter."""
        return tuple(int(np.prod([shape[d] for d in group])) for group in self.groups)

    def hf_index(self, index: Index, shape: tuple[int, ...]) -> Index:
        """The part of the stored tensor that holds `index` of one layer's parameter.

        Only the first dimension of a merged group may be cut: no mesh splits head_dim.
        """
        cuts = []
        for group in self.groups:
            first, *rest = group
            width = int(np.prod([shape[d] for d in rest], dtype=int))
            start, stop, _ = index[first].indices(shape[first])
            cuts.append(slice(start * width, stop * width))
        return tuple(cuts)

    @property
    def as_stored(self) -> bool:
        """Whether our dimensions are in the order in which the tensor stores them."""
        order = [dimension for group in self.groups for dimension in group]
        return order == sorted(order)

    def from_hf(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A stored tensor (or part) as our array of this shape; a view where possible."""
        order = [dimension for group in self.groups for dimension in group]
        return tensor.reshape([shape[d] for d in order]).transpose(np.argsort(order))

    def to_hf(self, array: jax.Array) -> jax.Array:
        """One layer's parameter as the stored tensor."""
        order = [dimension for group in self.groups for dimension in group]
        return array.transpose(order).reshape(self.hf_shape(array.shape))


_HEAD_BIAS = ((0, 1),)
_VECTOR = ((0,),)
_MATRIX = ((0,), (1,))


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def quantised_as(name: str, quantisation: Quantisation | None) -> Quantisation | None:
    """What a stored tensor becomes where weights are quantised: layers' projections that, the tokens' tables int8.

    None for all others.
    """
    if name in (EMBEDDING, HEAD):
        return quantisation and "int8"
    return quantisation if name.endswith("_proj.weight") else None


def scale_name(name: str) -> str:
    """What the scales of a quantised weight are called."""
    return f"{name}_scale"


def is_quantised(name: str) -> bool:
    """Whether a tensor of a quantised checkpoint is what became of a weight: integers, or their scales."""
    return quantised_as(name.removesuffix(scale_name("")), "int8") is not None


def tensor_layouts(config: QwenConfig, *, stacked: bool = True, scales: bool = False) -> list[TensorLayout]:
    """Every parameter of the architecture, in the order in which checkpoints store them; unstacked, every tensor.

    With `scales`, those of quantised weights too.
    """

    def layer(path: str, name: str, groups: tuple[tuple[int, ...], ...]) -> TensorLayout:
        return TensorLayout(("layers", *path.split(".")), f"model.layers.{{}}.{name}", groups)

    # Stored as (heads * head_dim, hidden), (hidden, heads * head_dim) and (outputs, inputs).
    if stacked:
        to_heads, from_heads, matrix = ((1, 2), (0,)), ((2,), (0, 1)), ((1,), (0,))
    else:
        to_heads, from_heads, matrix = ((0, 1), (2,)), ((0,), (1, 2)), _MATRIX
    layouts = [
        TensorLayout(("embedding", "weight"), EMBEDDING, _MATRIX),
        layer("attention_norm.scale", "input_layernorm.weight", _VECTOR),
        layer("attention.query.weight", "self_attn.q_proj.weight", to_heads),
        layer("attention.key.weight", "self_attn.k_proj.weight", to_heads),
        layer("attention.value.weight", "self_attn.v_proj.weight", to_heads),
        layer("attention.output.weight", "self_attn.o_proj.weight", from_heads),
        layer("mlp_norm.scale", "post_attention_layernorm.weight", _VECTOR),
        layer("mlp.gate.weight", "mlp.gate_proj.weight", matrix),
        layer("mlp.up.weight", "mlp.up_proj.weight", matrix),
        layer("mlp.down.weight", "mlp.down_proj.weight", matrix),
        TensorLayout(("norm", "scale"), "model.norm.weight", _VECTOR),
    ]
    if config.attention_bias:
        layouts += [
            layer(f"attention.{part}_bias", f"self_attn.{part[0]}_proj.bias", _HEAD_BIAS)
            for part in ("query", "key", "value")
        ]
    if config.qk_norm:
        layouts += [
            layer(f"attention.{part}_norm.scale", f"self_attn.{part[0]}_norm.weight", _VECTOR)
            for part in ("query", "key")
        ]
    if not config.tie_word_embeddings:
        layouts.append(TensorLayout(("head", "weight"), HEAD, _MATRIX))
    if scales:
        layouts += [_scales(layout) for layout in layouts if is_quantised(layout.name)]
    if stacked:
        return layouts
    return [
        replace(layout, path=("layers", i, *layout.path[1:]), name=layout.name.format(i))
        if layout.per_layer
        else layout
        for layout in layouts
        for i in range(config.num_hidden_layers if layout.per_layer else 1)
    ]


def _scales(weight: TensorLayout) -> TensorLayout:
    """Of the scales of a weight, stored as (outputs, groups)."""
    dimensions = len(weight.groups[0])
    groups = (tuple(range(dimensions)), (dimensions,))
    if not weight.as_stored:
        groups = (tuple(range(1, dimensions + 1)), (0,))
    return TensorLayout((*weight.path[:-1], "scale"), scale_name(weight.name), groups)
