"""The whole decoder: Qwen2, Qwen2.5 and Qwen3 dense.

`Qwen` is what the rest of the project uses: pure functions of a plain nested dict of parameters, which the modules in
`layers` declare.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from s1jax.config import CacheDtype, Implementation, Quantisation, Remat
from s1jax.mesh import Axes, constrain, named_sharding
from s1jax.model.config import QwenConfig
from s1jax.model.layers import Decoder, DecoderLayer, Hidden, Inputs, Weights
from s1jax.model.lora import Lora, split_adapters
from s1jax.model.paged_attention import CACHE_AXES, KVCache, LayerCache, PageTable, abstract_cache
from s1jax.model.projection import is_product, project
from s1jax.model.rope import rope_frequencies, rope_rotations

Params = dict[str, Any]
"""Nested dict of arrays, keyed by strings; `layers` holds every layer's parameters stacked on a first axis."""

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


@partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: Any, state: Any, x: Hidden, inputs: Inputs, cache: LayerCache | None) -> Any:
    """One layer; traced and lowered once for all layers. XLA inlines it for each."""
    return nnx.merge(graphdef, state)(x, inputs, cache)


@dataclass(frozen=True)
class Qwen:
    """An architecture together with how to run it; hashable, so a jitted function can close over it.

    `dtype` is that of the computation, `param_dtype` of the stored parameters. `remat` says what the forward pass
    keeps for the backward pass: "none" everything (no rematerialisation), "dots" the weight matmuls' outputs, "gate"
    each layer's input, the sum after its attention and its gate projection, which saves half of what recomputation
    costs, "heads" queries, keys and values too, "full" only the input. "offload" moves those and the up projection to
    the host's memory and back while the device computes. With `lora`, adapters are beside the weights: those are what
    is trained, in `param_dtype`, and the weights are frozen, in `base_dtype`. With `quantisation`, the weights of
    projections are integers with scales, with `cache_dtype`, those of keys and values in a cache.
    """

    config: QwenConfig
    dtype: DTypeLike = jnp.bfloat16
    param_dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    attention: Implementation = "auto"
    quantisation: Quantisation | None = None
    lora: Lora | None = None
    base_dtype: DTypeLike = jnp.bfloat16
    cache_dtype: CacheDtype | None = None

    def _declare(self, rngs: nnx.Rngs | None, stacked: bool = True) -> Decoder:
        dtype = self.base_dtype if self.lora else self.param_dtype
        weights = Weights(rngs, dtype, self.config.initializer_range, self.quantisation, self.lora, self.param_dtype)
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
        return self._init(key, mesh, lambda params: params)

    def init_trained(self, key: Array, mesh: Mesh | None = None) -> Params:
        """What `init` makes of the parameters that are trained, and nothing else: fresh adapters add 0."""
        return self._init(key, mesh, lambda params: self.split(params)[0])

    def _init(self, key: Array, mesh: Mesh | None, part: Callable[[Params], Params]) -> Params:
        shardings = jax.tree.map(lambda a: a.sharding, part(self.abstract_params(mesh)))

        def make(key: Array) -> Params:
            return part(nnx.to_pure_dict(nnx.state(self._declare(nnx.Rngs(params=key)))))

        return jax.jit(make, out_shardings=shardings if mesh else None)(key)

    def split(self, tree: Params) -> tuple[Params, Params]:
        """A tree like the parameters in two: what is trained, and what is frozen, which is {} without adapters."""
        return split_adapters(tree) if self.lora else (tree, {})

    def init_cache(self, pages: int) -> KVCache:
        """An empty cache of so many pages, those and heads spread over the mesh in use."""
        layer = self.abstract_cache(pages, jax.sharding.get_abstract_mesh().shape.get("tensor", 1))

        def empty(of: jax.ShapeDtypeStruct) -> Array:
            return constrain(jnp.zeros(of.shape, of.dtype), *CACHE_AXES[: of.ndim])

        return tuple(jax.tree.map(empty, layer) for _ in range(self.config.num_hidden_layers))

    def abstract_cache(self, pages: int, tensor: int) -> LayerCache:
        """Shapes and dtypes of one layer's cache of so many pages, on all devices of a tensor axis together."""
        return abstract_cache(self.config, self.dtype, self.cache_dtype, pages, tensor)

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
    ) -> tuple[Decoder, Hidden, Inputs]:
        """The modules with these parameters, the embeddings, and what all layers are given."""
        stacked = "attention" in params["layers"]
        decoder = nnx.merge(nnx.split(self._abstract if stacked else self._abstract_unrolled)[0], params)
        x = decoder.embedding.look_up(input_ids, self.dtype)
        frequencies, magnitude = rope_frequencies(self.config)
        rotations = rope_rotations(positions, frequencies, magnitude)
        rotations = jax.tree.map(lambda r: constrain(r, "batch", "length", *[None] * (r.ndim - 2)), rotations)
        return decoder, x, Inputs(rotations, positions, segment_ids, segment_lengths, page_table)

    def _scan(self, layers: DecoderLayer, x: Hidden, inputs: Inputs) -> Hidden:
        graphdef, stack = nnx.split(layers)

        def body(x: Hidden, state: Any) -> tuple[Hidden, None]:
            return nnx.merge(graphdef, state)(x, inputs)[0], None

        return jax.lax.scan(self._rematerialised(body, scanned=True), x, stack)[0]

    def _unroll(self, layers: Any, x: Hidden, inputs: Inputs, cache: KVCache | None) -> tuple[Hidden, KVCache | None]:
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
        head = params[self.head_name]
        return project(hidden, head["weight"], head.get("scale"), outputs_first=True, dtype=jnp.float32)

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
