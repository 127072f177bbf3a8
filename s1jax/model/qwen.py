"""The whole decoder: Qwen2, Qwen2.5 and Qwen3 dense.

NNX modules declare the parameters (shape, initial value and logical axes in one place) and compute one forward pass;
`Qwen` is what the rest of the project uses: pure functions of a plain nested dict of parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from s1jax.config import Implementation, Remat
from s1jax.mesh import Axes, constrain, named_sharding
from s1jax.model.attention import attention
from s1jax.model.config import QwenConfig
from s1jax.model.gates_and_norms import gated, normalised
from s1jax.model.paged_attention import (
    CACHE_AXES,
    KVCache,
    LayerCache,
    PageTable,
    cache_shape,
    num_pages,
    paged_attention,
    write,
)
from s1jax.model.projection import is_product, look_up, project
from s1jax.model.rope import rope_frequencies, rope_rotations, rotate

Params = dict[str, Any]
"""Nested dict of arrays, keyed by strings; `layers` holds every layer's parameters stacked on a first axis."""
Hidden = Float[Array, "batch length hidden"]

_REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,
    "gate": jax.checkpoint_policies.save_only_these_names("attended", "gate"),
    "heads": jax.checkpoint_policies.save_only_these_names("attended", "gate", "heads"),
    "dots": is_product,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["attended", "gate"],
        names_which_can_be_offloaded=["heads", "up"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class _Weights(NamedTuple):
    """How a module makes its parameters: random stream, storage dtype, spread, and the shape of the stack of layers.

    Without a random stream only their shapes are made.
    """

    rngs: nnx.Rngs | None
    dtype: DTypeLike
    standard_deviation: float
    stack: tuple[int, ...] = ()

    def __call__(self, axes: Axes, *shape: int, init: Callable[..., Array] | None = None) -> nnx.Param:
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

    def projection(self, inputs: dict[str, int], outputs: dict[str, int]) -> nnx.Param:
        """A projection's weight, between dimensions of these names and sizes."""
        sizes = {**outputs, **inputs} if self.outputs_first else {**inputs, **outputs}
        return self(tuple(sizes), *sizes.values())


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dimension, in float32."""

    def __init__(self, size: int, epsilon: float, weights: _Weights):
        self.scale = weights(("norm",), size, init=nnx.initializers.ones)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape size"]) -> Float[Array, "*shape size"]:
        """Normalise; the result has the dtype of `x`."""
        return normalised(x, self.scale[...], self.epsilon)


class Attention(nnx.Module):
    """Self-attention with rotary positions and grouped key/value heads, over the tokens or over a cache."""

    def __init__(self, config: QwenConfig, weights: _Weights, implementation: Implementation):
        embed, head_dim = {"embed": config.hidden_size}, {"head_dim": config.head_dim}
        heads = {"heads": config.num_attention_heads, **head_dim}
        kv_heads = {"kv_heads": config.num_key_value_heads, **head_dim}
        self.query = weights.projection(embed, heads)
        self.key = weights.projection(embed, kv_heads)
        self.value = weights.projection(embed, kv_heads)
        self.output = weights.projection(heads, embed)
        if config.attention_bias:
            zeros = nnx.initializers.zeros
            self.query_bias = weights(tuple(heads), *heads.values(), init=zeros)
            self.key_bias = weights(tuple(kv_heads), *kv_heads.values(), init=zeros)
            self.value_bias = weights(tuple(kv_heads), *kv_heads.values(), init=zeros)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps, weights)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps, weights)
        self.config = config
        self.outputs_first = weights.outputs_first
        self.implementation: Implementation = implementation

    def __call__(
        self, x: Hidden, inputs: "_Inputs", cache: LayerCache | None = None
    ) -> tuple[Hidden, LayerCache | None]:
        """Attend; with a cache, over what it holds too, unless the table has no pages but for these tokens."""
        # Gathered along the sequence once for all three projections, whose heads are then where attention wants them.
        x = constrain(x, "batch", "length", None)
        query, key, value = (
            project(x, weight[...], outputs_first=self.outputs_first) for weight in (self.query, self.key, self.value)
        )
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
            context = attention(
                query,
                key,
                value,
                segment_ids=inputs.segment_ids,
                segment_lengths=inputs.segment_lengths,
                implementation=self.implementation,
            )
        return project(context, self.output[...], inputs=2, outputs_first=self.outputs_first), cache


class MLP(nnx.Module):
    """The gated feed-forward block, down(silu(gate(x)) * up(x))."""

    def __init__(self, config: QwenConfig, weights: _Weights):
        embed, mlp = {"embed": config.hidden_size}, {"mlp": config.intermediate_size}
        self.gate = weights.projection(embed, mlp)
        self.up = weights.projection(embed, mlp)
        self.down = weights.projection(mlp, embed)
        self.outputs_first = weights.outputs_first

    def __call__(self, x: Hidden) -> Hidden:
        """Apply the block to each token."""
        gate = checkpoint_name(project(x, self.gate[...], outputs_first=self.outputs_first), "gate")
        up = checkpoint_name(project(x, self.up[...], outputs_first=self.outputs_first), "up")
        inner = constrain(gated(gate, up), "batch", "length", "mlp")
        return project(inner, self.down[...], outputs_first=self.outputs_first)


class _Inputs(NamedTuple):
    """What every layer sees beside the residual stream."""

    rotations: tuple[Array, Array]
    positions: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"] | None
    segment_lengths: Int[Array, "batch segments"] | None
    page_table: PageTable | None


class DecoderLayer(nnx.Module):
    """Attention and feed-forward block, each behind a norm and added to the residual stream."""

    def __init__(self, config: QwenConfig, weights: _Weights, implementation: Implementation):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weights)
        self.attention = Attention(config, weights, implementation)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weights)
        self.mlp = MLP(config, weights)

    def __call__(self, x: Hidden, inputs: _Inputs, cache: LayerCache | None = None) -> tuple[Hidden, LayerCache | None]:
        """One layer's residual update, and its cache with these tokens written."""
        x = constrain(x, "batch", "residual_length", None)
        with jax.named_scope("attention"):
            update, cache = self.attention(self.attention_norm(x), inputs, cache)
            x = checkpoint_name(constrain(x + update, "batch", "residual_length", None), "attended")
        with jax.named_scope("mlp"):
            return constrain(x + self.mlp(self.mlp_norm(x)), "batch", "residual_length", None), cache


@partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: Any, state: Any, x: Hidden, inputs: _Inputs, cache: LayerCache | None) -> Any:
    """One layer; traced and lowered once for all layers. XLA inlines it for each."""
    return nnx.merge(graphdef, state)(x, inputs, cache)


class Decoder(nnx.Module):
    """Embedding, the stack of layers, final norm and output head."""

    def __init__(self, config: QwenConfig, weights: _Weights, implementation: Implementation, stacked: bool):
        layers = config.num_hidden_layers
        self.embedding = weights(("vocab", "embed"), config.vocab_size, config.hidden_size)
        if stacked:
            self.layers = DecoderLayer(config, weights._replace(stack=(layers,)), implementation)
        else:
            self.layers = nnx.List([DecoderLayer(config, weights, implementation) for _ in range(layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weights)
        if not config.tie_word_embeddings:
            self.head = weights(("vocab", "embed"), config.vocab_size, config.hidden_size)


@dataclass(frozen=True)
class Qwen:
    """An architecture together with how to run it; hashable, so a jitted function can close over it.

    `dtype` is that of the computation, `param_dtype` of the stored parameters. `remat` says what the forward pass
    keeps for the backward pass: "none" everything (no rematerialisation), "dots" the weight matmuls' outputs, "gate"
    each layer's input, the sum after its attention and its gate projection, which saves half of what recomputation
    costs, "heads" queries, keys and values too, "full" only the input. "offload" moves those and the up projection to
    the host's memory and back while the device computes.
    """

    config: QwenConfig
    dtype: DTypeLike = jnp.bfloat16
    param_dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    attention: Implementation = "auto"

    def _declare(self, rngs: nnx.Rngs | None, stacked: bool = True) -> Decoder:
        weights = _Weights(rngs, self.param_dtype, self.config.initializer_range)
        return Decoder(self.config, weights, self.attention, stacked)

    @cached_property
    def _abstract(self) -> Decoder:
        return self._declare(None)

    @cached_property
    def _abstract_unrolled(self) -> Decoder:
        return self._declare(None, stacked=False)

    def axes(self, *, stacked: bool = True) -> Params:
        """The logical axes of every parameter: a tree like the parameters, with a tuple of names at each leaf."""
        tree: Params = {}
        for path, param in nnx.to_flat_state(nnx.state(self._abstract if stacked else self._abstract_unrolled)):
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = param.get_metadata("axes")
        return tree

    def abstract_params(self, mesh: Mesh | AbstractMesh | None = None, *, stacked: bool = True) -> Params:
        """Shape and dtype of every parameter, and its sharding if a mesh is given; nothing is allocated.

        Not `stacked`, `layers` holds a tree for each layer's number, as decoding wants it. Raises MeshError naming the
        dimension that does not fit the mesh.
        """
        shapes = nnx.to_pure_dict(nnx.state(self._abstract if stacked else self._abstract_unrolled))
        if mesh is None:
            return shapes
        return jax.tree.map(
            lambda shape, axes: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=named_sharding(mesh, axes, shape.shape)
            ),
            shapes,
            self.axes(stacked=stacked),
        )

    def init(self, key: Array, mesh: Mesh | None = None) -> Params:
        """Fresh random parameters, made in place on the mesh; the same values on any mesh."""
        shardings = jax.tree.map(lambda a: a.sharding, self.abstract_params(mesh))

        def make(key: Array) -> Params:
            return nnx.to_pure_dict(nnx.state(self._declare(nnx.Rngs(params=key))))

        return jax.jit(make, out_shardings=shardings if mesh else None)(key)

    def init_cache(self, pages: int) -> KVCache:
        """An empty cache of so many pages, those and heads spread over the mesh in use."""
        shape = cache_shape(self.config, pages, jax.sharding.get_abstract_mesh().shape.get("tensor", 1))

        def empty() -> Array:
            return constrain(jnp.zeros(shape, self.dtype), *CACHE_AXES)

        return tuple(LayerCache(empty(), empty()) for _ in range(self.config.num_hidden_layers))

    def hidden_states(
        self,
        params: Params,
        input_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        cache: KVCache | None = None,
        *,
        page_table: PageTable | None = None,
        segment_lengths: Int[Array, "batch segments"] | None = None,
    ) -> tuple[Hidden, KVCache | None]:
        """Run the layers; returns the normalised hidden states, and the cache with these tokens written.

        `positions` are the rotary positions, and the places in its pages (`page_table`) that a row's tokens are written
        to. With a cache, `params` are unrolled, and each token sees those of its row up to itself; several, one after
        the other from the beginning of a page, are what a row begins with if the table has no more pages than theirs.
        `segment_ids` (0 = padding) keep packed examples apart, `segment_lengths`
        tell GPU's attention how long each is; not with a cache.
        Unrolled `params` (`abstract_params(stacked=False)`) run layer by layer, stacked ones are scanned.
        """
        if cache is not None and ("attention" in params["layers"] or segment_ids is not None):
            raise ValueError("a cache needs parameters that are unrolled, and has no segments")
        decoder, x, inputs = self._begin(params, input_ids, positions, segment_ids, segment_lengths, page_table)
        if "attention" in params["layers"]:
            return decoder.norm(self._scan(decoder.layers, x, inputs)), None
        x, cache = self._unroll(decoder.layers, x, inputs, cache)
        return decoder.norm(x), cache

    def between_layers(
        self, params: Params, input_ids: Int[Array, "batch length"], positions: Int[Array, "batch length"]
    ) -> list[Hidden]:
        """What goes into each layer, and what comes out of the last; `params` are unrolled."""
        decoder, x, inputs = self._begin(params, input_ids, positions)
        states = [x]
        for layer in decoder.layers:
            states.append(layer(states[-1], inputs)[0])
        return states

    def _begin(
        self,
        params: Params,
        input_ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"] | None = None,
        segment_lengths: Int[Array, "batch segments"] | None = None,
        page_table: PageTable | None = None,
    ) -> tuple[Decoder, Hidden, _Inputs]:
        """The modules with these parameters, the embeddings, and what all layers are given."""
        stacked = "attention" in params["layers"]
        decoder = nnx.merge(nnx.split(self._abstract if stacked else self._abstract_unrolled)[0], params)
        x = look_up(decoder.embedding[...], input_ids, self.dtype)
        frequencies, magnitude = rope_frequencies(self.config)
        rotations = rope_rotations(positions, frequencies, magnitude)
        rotations = jax.tree.map(lambda r: constrain(r, "batch", "length", *[None] * (r.ndim - 2)), rotations)
        return decoder, x, _Inputs(rotations, positions, segment_ids, segment_lengths, page_table)

    def _scan(self, layers: DecoderLayer, x: Hidden, inputs: _Inputs) -> Hidden:
        graphdef, stack = nnx.split(layers)

        def body(x: Hidden, state: Any) -> tuple[Hidden, None]:
            return nnx.merge(graphdef, state)(x, inputs)[0], None

        return jax.lax.scan(self._rematerialised(body, scanned=True), x, stack)[0]

    def _unroll(self, layers: Any, x: Hidden, inputs: _Inputs, cache: KVCache | None) -> tuple[Hidden, KVCache | None]:
        written = []
        for i, layer in enumerate(layers):
            graphdef, state = nnx.split(layer)
            run = self._rematerialised(partial(_run_layer, graphdef), scanned=False)
            x, own = run(state, x, inputs, cache[i] if cache else None)
            written.append(own)
        return x, tuple(written) if cache else None

    def _rematerialised(self, layer: Callable[..., Any], *, scanned: bool) -> Callable[..., Any]:
        if self.remat == "none":
            return layer
        # A scan's body is out of reach of common-subexpression elimination; unrolled layers must be kept from it.
        return jax.checkpoint(layer, policy=_REMAT_POLICIES[self.remat], prevent_cse=not scanned)

    @property
    def head_name(self) -> str:
        """The key of the output head among the parameters."""
        return "embedding" if self.config.tie_word_embeddings else "head"

    def logits(self, params: Params, hidden: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocab"]:
        """Scores of the next token, in float32."""
        return project(hidden, params[self.head_name], outputs_first=True, dtype=jnp.float32)

    def unstack(self, params: Params) -> Params:
        """The same parameters in the arrangement that `hidden_states` runs unrolled: arrays and axes of each layer."""
        stacked, unrolled = self.axes()["layers"], self.axes(stacked=False)["layers"]

        def take(i: int, stack: Array, axes: Axes, wanted: Axes) -> Array:
            return stack[i].transpose([axes[1:].index(name) for name in wanted])

        layers = {
            i: jax.tree.map(partial(take, i), params["layers"], stacked, unrolled[i])
            for i in range(self.config.num_hidden_layers)
        }
        return {**params, "layers": layers}
