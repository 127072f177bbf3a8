"""The compiled training step: loss, gradients over the microbatches, and the update."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int

from s1jax.data.packing import Batch
from s1jax.mesh import constrain, named_sharding
from s1jax.model.lora import join
from s1jax.model.qwen import Params, Qwen
from s1jax.model.token_logprobs import token_logprobs
from s1jax.training.config import OptimizerSection
from s1jax.training.optimizer import adamw, learning_rate


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]
    params: Params
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """What a step reports; a step that is not `finite` changed nothing but the step count."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; every microbatch is spread over the whole mesh."""
    spec = named_sharding(mesh, ("batch", "length"), (mesh.size, 1)).spec
    return NamedSharding(mesh, PartitionSpec(None, *spec))


def loss(model: Qwen, params: Params, batch: Batch) -> Float[Array, ""]:
    """Weighted negative log-likelihood of one microbatch (no microbatch axis), in float32."""
    hidden, _ = model.hidden_states(
        params, batch.input_ids, batch.positions, batch.segment_ids, segment_lengths=batch.segment_lengths
    )
    logprobs, _ = token_logprobs(model, params, hidden, batch.targets)
    return -jnp.sum(jnp.where(batch.weights > 0, batch.weights * logprobs, 0.0))


def gradients(model: Qwen, params: Params, frozen: Params, batch: Batch) -> tuple[Float[Array, ""], Params]:
    """Loss of the whole step and its float32 gradients by `params`, which together with `frozen` are the model's.

    The sum over the microbatches, which the weights make a mean.
    """
    axes_of, _ = model.split(model.axes())

    def value_and_grad(params: Params, microbatch: Batch) -> tuple[Array, Params]:
        value, grads = jax.value_and_grad(lambda params: loss(model, join(params, frozen), microbatch))(params)
        # Said outright, so that sums over the mesh are scattered where they are made, never held whole.
        return value, jax.tree.map(
            lambda axes, g: constrain(g, *axes), axes_of, grads, is_leaf=lambda x: isinstance(x, tuple)
        )

    if batch.input_ids.shape[0] == 1:
        return value_and_grad(params, jax.tree.map(lambda x: x[0], batch))

    def add(total: tuple[Array, Params], microbatch: Batch) -> tuple[tuple[Array, Params], None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, microbatch)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, batch)[0]


def train_step(
    model: Qwen, section: OptimizerSection, total_steps: int, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, StepMetrics]:
    """One optimiser step. If loss or gradient is not finite, parameters and moments stay as they are."""
    value, grads = gradients(model, state.params, frozen, batch)
    grad_norm = optax.tree.norm(grads)
    rate = learning_rate(section, total_steps)(state.step)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    updates, optimizer = adamw(section, model).update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates)
    params, optimizer = jax.tree.map(partial(jnp.where, finite), (params, optimizer), (state.params, state.optimizer))
    return TrainState(state.step + 1, params, optimizer), StepMetrics(value, grad_norm, rate, finite)


def compile_step(model: Qwen, section: OptimizerSection, total_steps: int, mesh: Mesh) -> Wrapped:
    """The step jitted for the mesh: (state, frozen parameters, batch) to (state, metrics).

    The state goes in and out where `abstract_state` says, its buffers reused.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, section, mesh))
    frozen = jax.tree.map(lambda leaf: leaf.sharding, abstract_frozen(model, mesh))
    on_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return jax.jit(
        partial(train_step, model, section, total_steps),
        in_shardings=(shardings, frozen, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=_gpu_options(model) if on_gpu else None,
    )


def _gpu_options(model: Qwen) -> dict[str, str]:
    """Keep XLA from trading arithmetic for memory again, beyond what `remat` has said.

    It does so from a percentage of what it takes for a GPU's room, which is 80% of its memory; up to there, 94% of it,
    it does not. What is on the host it counts as the GPU's, too.
    """
    return {"xla_gpu_memory_limit_slop_factor": "1000" if model.remat == "offload" else "117"}


def compile_loss(model: Qwen, mesh: Mesh) -> Wrapped:
    """The loss of (trained parameters, frozen ones, a whole batch of held-out examples), jitted for the mesh."""

    def evaluate(params: Params, frozen: Params, batch: Batch) -> Float[Array, ""]:
        return jnp.sum(jax.lax.map(partial(loss, model, join(params, frozen)), batch))

    trained, frozen = model.split(jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params(mesh)))
    return jax.jit(evaluate, in_shardings=(trained, frozen, batch_sharding(mesh)))


def init_state(model: Qwen, section: OptimizerSection, mesh: Mesh, params: Params) -> TrainState:
    """A state at step 0 around these trained parameters, moments sharded like them."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, section, mesh))

    def start(params: Params) -> tuple[Array, optax.OptState]:
        return jnp.zeros((), jnp.int32), adamw(section, model).init(params)

    step, optimizer = jax.jit(start, out_shardings=(shardings.step, shardings.optimizer))(params)
    return TrainState(step, params, optimizer)


def abstract_state(model: Qwen, section: OptimizerSection, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of a training state; nothing is allocated."""
    params, _ = model.split(model.abstract_params(mesh))
    replicated = NamedSharding(mesh, PartitionSpec())
    transformation = adamw(section, model)

    def place(leaf: Any, param: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding)

    optimizer = optax.tree_utils.tree_map_params(
        transformation,
        place,
        jax.eval_shape(transformation.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(step, params, optimizer)


def abstract_frozen(model: Qwen, mesh: Mesh) -> Params:
    """Shape, dtype and sharding of the parameters that are not trained."""
    return model.split(model.abstract_params(mesh))[1]
