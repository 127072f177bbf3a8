"""The modules of the decoder: each declares its parameters (shape, initial value and logical axes in one place) and
computes its part of a forward pass.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from s1jax.config import Implementation, LoraTarget, Quantisation
from s1jax.mesh import Axes, constrain
from s1jax.model.attention import attention
from s1jax.model.config import QwenConfig
from s1jax.model.gates_and_norms import gated, normalised
from s1jax.model.lora import Lora
from s1jax.model.paged_attention import LayerCache, PageTable, as_kept, num_pages, paged_attention, write
from s1jax.model.projection import look_up, project, project_gated
from s1jax.model.quantisation import GREATEST, num_groups
from s1jax.model.rope import rotate

Hidden = Float[Array, "batch length hidden"]
Sizes = dict[str, int]
"""Of dimensions, by their logical names."""


class Weights(NamedTuple):
    """How modules make their parameters: random stream, storage dtypes, spread, adapters, and the stack of layers.

    Without a random stream only their shapes are made.
    """

    rngs: nnx.Rngs | None
    dtype: DTypeLike
    standard_deviation: float
    quantisation: Quantisation | None = None
    lora: Lora | None = None
    adapter_dtype: DTypeLike = jnp.float32
    stack: tuple[int, ...] = ()

    def array(self, axes: Axes, *shape: int, init: Callable[..., Array] | None = None) -> nnx.Param:
        """A parameter with these logical axes, and those of the stack before them."""
        shape = (*self.stack, *shape)
        if self.rngs is None:
            value: Array | jax.ShapeDtypeStruct = jax.ShapeDtypeStruct(shape, self.dtype)
        else:
            init = init or nnx.initializers.normal(self.standard_deviation)
            value = init(self.rngs.params(), shape, self.dtype)
        return nnx.Param(value, axes=("layers",) * len(self.stack) + axes)

    @property
    def outputs_first(self) -> bool:
        """How projections are stored: unrolled, as checkpoints do, which products of few rows read fastest."""
        return not self.stack

    def matrix(self, inputs: Sizes, outputs: Sizes, init: Callable[..., Array] | None = None) -> nnx.Param:
        """The weight of a product, between dimensions of these names and sizes."""
        sizes = {**outputs, **inputs} if self.outputs_first else {**inputs, **outputs}
        return self.array(tuple(sizes), *sizes.values(), init=init)


class Projection(nnx.Module):
    """A product with a weight, summed over the last dimensions of activations; and with an adapter beside it.

    An adapter (LoRA, arXiv 2106.09685) adds the scaled product with `lora_a` and then `lora_b`.
    """

    def __init__(self, weights: Weights, target: LoraTarget | None, inputs: Sizes, outputs: Sizes):
        if kind := weights.quantisation:
            groups = {"groups": num_groups(kind, math.prod(inputs.values()))}
            of_unit = weights.standard_deviation * 3**0.5 / GREATEST[kind]
            constant = nnx.initializers.constant(of_unit)
            self.scale = weights._replace(dtype=jnp.float32).matrix(groups, outputs, constant)
            self.weight = weights._replace(dtype=jnp.dtype(kind)).matrix(inputs, outputs, _integers(GREATEST[kind]))
        else:
            self.scale = None
            self.weight = weights.matrix(inputs, outputs)
        self.num_inputs = len(inputs)
        self.outputs_first = weights.outputs_first
        self.adapter_scale = 0.0
        lora = weights.lora
        if lora and target in lora.targets:
            adapter = weights._replace(dtype=weights.adapter_dtype)
            begin = _uniform(math.prod(inputs.values()) ** -0.5)
            self.lora_a = adapter.matrix(inputs, {_rank(inputs): lora.rank}, init=begin)
            self.lora_b = adapter.matrix({_rank(outputs): lora.rank}, outputs, init=nnx.initializers.zeros)
            self.adapter_scale = lora.scale

    @property
    def is_plain(self) -> bool:
        """Whether there is but one weight, and no scale, and its outputs come first."""
        return self.outputs_first and self.scale is None and not self.adapter_scale

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum of both, in the dtype of `x`."""
        scale = None if self.scale is None else self.scale[...]
        product = project(x, self.weight[...], scale, inputs=self.num_inputs, outputs_first=self.outputs_first)
        if self.adapter_scale:
            low = project(x, self.lora_a[...], inputs=self.num_inputs, outputs_first=self.outputs_first)
            product += self.adapter_scale * project(low, self.lora_b[...], outputs_first=self.outputs_first)
        return product


class Table(Projection):
    """A vector for each token of the vocabulary: looked up, or multiplied with hidden states for the tokens' scores.

    Where weights are quantised, it is of int8.
    """

    def __init__(self, config: QwenConfig, weights: Weights):
        weights = weights._replace(quantisation=weights.quantisation and "int8")
        super().__init__(weights, None, {"embed": config.hidden_size}, {"vocab": config.vocab_size})

    def look_up(self, ids: Int[Array, "*ids"], dtype: DTypeLike) -> Float[Array, "*ids hidden"]:
        """The tokens' vectors, in `dtype`."""
        return look_up(self.weight[...], ids, dtype, None if self.scale is None else self.scale[...])


def _rank(others: Sizes) -> str:
    """The rank's logical name beside these dimensions of an adapter's half: one of both lies over the shards."""
    return "rank" if "embed" in others else "divided_rank"


def _integers(bound: int) -> Callable[..., Array]:
    """Between minus this and this."""
    return lambda key, shape, dtype: jax.random.randint(key, shape, -bound, bound + 1, jnp.int8).astype(dtype)


def _uniform(bound: float) -> Callable[..., Array]:
    """Between minus this and this, as torch begins a linear layer, and PEFT the first half of an adapter."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dimension, in float32."""

    def __init__(self, size: int, epsilon: float, weights: Weights):
        self.scale = weights.array(("norm",), size, init=nnx.initializers.ones)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape size"]:
        """Normalise; the result has the dtype of `x`."""
        return normalised(x, self.scale[...], self.epsilon)


class Inputs(NamedTuple):
    """What every layer sees beside the residual stream."""

    rotations: tuple[Array, Array]
    positions: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"] | None
    segment_lengths: Int[Array, "batch segments"] | None
    page_table: PageTable | None


class Attention(nnx.Module):
    """Self-attention with rotary positions and grouped key/value heads, over the tokens or over a cache."""

    def __init__(self, config: QwenConfig, weights: Weights, implementation: Implementation):
        embed, head_dim = {"embed": config.hidden_size}, {"head_dim": config.head_dim}
        heads = {"heads": config.num_attention_heads, **head_dim}
        kv_heads = {"kv_heads": config.num_key_value_heads, **head_dim}
        self.query = Projection(weights, "q_proj", embed, heads)
        self.key = Projection(weights, "k_proj", embed, kv_heads)
        self.value = Projection(weights, "v_proj", embed, kv_heads)
        self.output = Projection(weights, "o_proj", heads, embed)
        if config.attention_bias:
            zeros = nnx.initializers.zeros
            self.query_bias = weights.array(tuple(heads), *heads.values(), init=zeros)
            self.key_bias = weights.array(tuple(kv_heads), *kv_heads.values(), init=zeros)
            self.value_bias = weights.array(tuple(kv_heads), *kv_heads.values(), init=zeros)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps, weights)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps, weights)
        self.config = config
        self.implementation: Implementation = implementation

    def __call__(self, x: Hidden, inputs: Inputs, cache: LayerCache | None = None) -> tuple[Hidden, LayerCache | None]:
        """Attend; with a cache, over what it holds too, unless the table has no pages but for these tokens."""
        # Gathered along the sequence once for all three projections, whose heads are then where attention wants them.
        x = constrain(x, "batch", "length", None)
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.config.attention_bias:
            query += self.query_bias[...].astype(x.dtype)
            key += self.key_bias[...].astype(x.dtype)
            value += self.value_bias[...].astype(x.dtype)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = constrain(rotate(query, inputs.rotations), "batch", "length", "heads", "head_dim")
        key = rotate(key, inputs.rotations)
        query, key, value = (checkpoint_name(x, "heads") for x in (query, key, value))
        table = inputs.page_table
        if cache is not None:
            assert table is not None
            cache = write(cache, key, value, table, inputs.positions)
        if cache is not None and table is not None and (x.shape[1] == 1 or table.shape[1] > num_pages(x.shape[1])):
            context = paged_attention(query, cache, table, inputs.positions, implementation=self.implementation)
        else:
            if cache is not None:
                key, value = as_kept(cache, key), as_kept(cache, value)
            context = attention(
                query,
                key,
                value,
                segment_ids=inputs.segment_ids,
                segment_lengths=inputs.segment_lengths,
                implementation=self.implementation,
            )
        return self.output(context), cache


class MLP(nnx.Module):
    """The gated feed-forward block, down(silu(gate(x)) * up(x))."""

    def __init__(self, config: QwenConfig, weights: Weights):
        embed, mlp = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        self.gate = Projection(weights, "gate_proj", embed, mlp)
        self.up = Projection(weights, "up_proj", embed, mlp)
        self.down = Projection(weights, "down_proj", mlp, embed)

    def __call__(self, x: Hidden) -> Hidden:
        """Apply the block to each token."""
        inner = None
        if self.gate.is_plain and self.up.is_plain:
            inner = project_gated(x, self.gate.weight[...], self.up.weight[...])
        if inner is None:
            inner = gated(checkpoint_name(self.gate(x), "gate"), checkpoint_name(self.up(x), "up"))
        return self.down(constrain(inner, "batch", "length", "mlp"))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward block, each behind a norm and added to the residual stream."""

    def __init__(self, config: QwenConfig, weights: Weights, implementation: Implementation):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weights)
        self.attention = Attention(config, weights, implementation)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weights)
        self.mlp = MLP(config, weights)

    def __call__(self, x: Hidden, inputs: Inputs, cache: LayerCache | None = None) -> tuple[Hidden, LayerCache | None]:
        """One layer's residual update, and its cache with these tokens written."""
        x = constrain(x, "batch", "residual_length", None)
        with jax.named_scope("attention"):
            update, cache = self.attention(self.attention_norm(x), inputs, cache)
            x = checkpoint_name(constrain(x + update, "batch", "residual_length", None), "attended")
        with jax.named_scope("mlp"):
            return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "residual_length", None), cache


class Decoder(nnx.Module):
    """Embedding, the stack of layers, final norm and output head."""

    def __init__(self, config: QwenConfig, weights: Weights, implementation: Implementation, stacked: bool):
        layers = config.num_hidden_layers
        self.embedding = Table(config, weights)
        if stacked:
            self.layers = DecoderLayer(config, weights._replace(stack=(layers,)), implementation)
        else:
            self.layers = nnx.List([DecoderLayer(config, weights, implementation) for _ in range(layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weights)
        if not config.tie_word_embeddings:
            self.head = Table(config, weights)
