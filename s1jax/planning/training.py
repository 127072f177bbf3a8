"""Memory, time and arithmetic of a training run, from its compiled steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from jax.sharding import Mesh

from s1jax.config import Remat
from s1jax.data.examples import Example
from s1jax.data.loader import StepLoader
from s1jax.data.packing import Shape
from s1jax.mesh import device_bytes, make_mesh
from s1jax.model.architectures import known_architecture
from s1jax.model.config import QwenConfig
from s1jax.model.flops import attention_flops, weight_flops
from s1jax.model.lora import join
from s1jax.model.qwen import Qwen
from s1jax.paths import BucketPath, any_path
from s1jax.planning.compiled import compile_for
from s1jax.planning.estimate import Estimate, Memory, estimate, usable_bytes
from s1jax.planning.hardware import PlanError, Target
from s1jax.planning.hlo import Collective, Program
from s1jax.planning.lengths import example_lengths
from s1jax.planning.storage import Storage, plan_storage
from s1jax.training.config import TrainConfig
from s1jax.training.loop import for_rows, step_loader, training_model
from s1jax.training.step import abstract_frozen, abstract_state, batch_sharding, compile_step

_KERNELS = {"cudnn": False, "tpu_custom_call": True}
"""Parts of the names that attention kernels are called by, and whether they compute the scores of other examples too,
only to mask them."""
_BACKWARD_UNITS = 2.5
"""Matrix products of a flash kernel's backward pass, in those of its forward pass."""


@dataclass(frozen=True)
class ShapePlan:
    """The step program for one shape of rows; counts and bytes are those of one device."""

    rows: int
    """Of the whole step, over all microbatches."""
    length: int
    steps: int
    """Of the run's steps, how many have this shape."""
    remat: Remat
    memory: Memory
    dot_flops: float
    model_flops: float
    """Of the same positions by the convention of `model.flops`, attention and recomputation left out."""
    collectives: list[Collective]
    kernels: dict[str, int]
    score_arrays: int
    """Arrays of length x length in the program; none where attention is a kernel."""
    estimate: Estimate

    @property
    def flop_ratio(self) -> float:
        """What recomputation costs: matrix products done over those that the model has."""
        return self.dot_flops / self.model_flops


@dataclass(frozen=True)
class TrainingPlan:
    """A whole run on a target."""

    target: str
    mesh: dict[str, int]
    remat: str
    gradient_accumulation_steps: int
    block_size: int
    lengths: str
    steps: int
    padding_share: float
    usable_bytes: int
    parameters: dict[str, str]
    """Of every parameter, how it is spread: its shape, and that of one device's part."""
    shapes: list[ShapePlan]
    seconds: float
    """Of all steps, without start, compilation, checkpoints and export."""
    flop_ratio: float
    """Averaged over the run's steps."""
    storage: Storage | None
    """If a bandwidth is given."""

    @property
    def run_seconds(self) -> float:
        """Of all steps and of what the run waits for while it writes, if that is counted."""
        return self.seconds + (self.storage.seconds if self.storage else 0.0)

    @property
    def peak_bytes(self) -> int:
        """Memory of the shape that needs most."""
        return max(shape.memory.total for shape in self.shapes)

    @property
    def fits(self) -> bool:
        """Whether every shape has room."""
        return self.peak_bytes <= self.usable_bytes


def resolve_architecture(path: str) -> QwenConfig:
    """The architecture of a model directory or hub id; of a hub id at most config.json is read.

    Raises PlanError if there is neither, UnsupportedConfigError if it is not supported.
    """
    directory = any_path(path)
    if isinstance(directory, BucketPath) or directory.is_dir():
        return QwenConfig.from_directory(directory)
    known = known_architecture(path)
    if known is not None:
        return known
    try:
        return QwenConfig.from_directory(Path(hf_hub_download(path, "config.json")).parent)
    except (OSError, HFValidationError) as error:
        raise PlanError(f"model.path {path}: no such directory, and its config.json cannot be had: {error}") from None


def plan_run(
    config: TrainConfig,
    target: Target,
    devices: Sequence[jax.Device],
    architecture: QwenConfig,
    *,
    largest_only: bool = False,
) -> TrainingPlan:
    """Compile every shape of the run and add it up; or only the largest, and take the others to be in proportion.

    Raises MeshError, ValueError, PlanError or InputError.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    lengths, source = example_lengths(config)
    loader = step_loader(config, _examples(lengths), mesh, (0, 1), 0)
    planner = _Planner(config, target, mesh, training_model(config, architecture), loader)
    largest_first = sorted(loader.shapes.items(), key=lambda item: -item[0][0] * item[0][1])
    compiled = largest_first[:1] if largest_only else largest_first
    shapes = [planner.plan_shape(shape, steps) for shape, steps in compiled]
    positions = sum(rows * length * steps for (rows, length), steps in largest_first)
    planned = sum(shape.rows * shape.length * shape.steps for shape in shapes)
    seconds = positions / planned * sum(shape.steps * shape.estimate.total for shape in shapes)
    # A run cut short by max_steps has its shapes in the same proportions.
    seconds *= planner.total_steps / len(loader)
    return TrainingPlan(
        target=str(target),
        mesh=dict(mesh.shape),
        remat=config.model.remat,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        block_size=config.data.block_size,
        lengths=source,
        steps=planner.total_steps,
        padding_share=loader.padding_share,
        usable_bytes=usable_bytes(target.hardware),
        parameters=planner.parameters(),
        shapes=shapes,
        seconds=seconds,
        flop_ratio=sum(s.steps * s.dot_flops for s in shapes) / sum(s.steps * s.model_flops for s in shapes),
        storage=planner.storage(seconds),
    )


def _examples(lengths: np.ndarray) -> list[Example]:
    ids, mask = np.zeros(lengths.max(), np.int32), np.ones(lengths.max(), bool)
    return [Example(ids[:length], mask[:length]) for length in lengths]


class _Planner:
    """Compiles the steps of one run."""

    def __init__(self, config: TrainConfig, target: Target, mesh: Mesh, model: Qwen, loader: StepLoader):
        self._config, self._target, self._mesh, self._model = config, target, mesh, model
        self._loader = loader
        self.total_steps = min(len(loader), config.training.max_steps or len(loader))
        # Devices to compile for hold no array, not even optax's placeholders: all this is made without the mesh in use.
        self._state, self._frozen = abstract_state(model, config.optimizer, mesh), abstract_frozen(model, mesh)

    def storage(self, seconds: float) -> Storage | None:
        """What the run writes, if it is known how fast."""
        config = self._config
        if config.plan.storage_gigabytes_per_second is None:
            return None
        exported = replace(self._model, lora=None, quantisation=None).abstract_params()
        parameters = sum(leaf.size for leaf in jax.tree.leaves(exported))
        step_seconds, minutes = seconds / self.total_steps, config.checkpoint.every_minutes
        by_clock = None if minutes is None else math.ceil(60 * minutes / step_seconds)
        return plan_storage(
            checkpoint_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._state)),
            export_bytes=parameters * jnp.dtype(config.training.export_dtype).itemsize,
            steps=self.total_steps,
            step_seconds=step_seconds,
            every_steps=min(filter(None, (config.checkpoint.every_steps, by_clock)), default=None),
            hosts=self._target.num_hosts,
            gigabytes_per_second=config.plan.storage_gigabytes_per_second,
        )

    def plan_shape(self, shape: Shape, steps: int) -> ShapePlan:
        """Compile the step for rows of this shape. Raises PlanError if the compiler finds no room for it."""
        rows, length = shape
        batch = self._loader.abstract_batch(shape, batch_sharding(self._mesh))
        model = for_rows(self._model, self._config.model, length)
        step = compile_step(model, self._config.optimizer, self.total_steps, self._mesh)
        with jax.set_mesh(self._mesh):
            compiled = compile_for(
                self._target, step.lower(self._state, self._frozen, batch), f"{rows} rows x {length}"
            )
        program, config = Program(compiled.text), self._model.config
        kernel_flops = self._kernel_flops(program, shape, model.remat)
        efficiency = self._config.plan.efficiency
        return ShapePlan(
            rows=rows,
            length=length,
            steps=steps,
            remat=model.remat,
            memory=Memory(
                parameters=device_bytes([self._state.params, self._frozen]),
                optimizer=device_bytes(self._state.optimizer),
                batch=device_bytes(batch),
                temporaries=compiled.temporaries,
                on_host=compiled.on_host,
            ),
            dot_flops=program.dot_flops,
            model_flops=weight_flops(config, model.lora, rows * length) / self._mesh.size,
            collectives=program.collectives,
            kernels=program.kernels,
            score_arrays=sum(shape.dimensions.count(length) >= 2 for shape in program.shapes()),
            estimate=estimate(program, self._target, efficiency=efficiency, kernel_flops=kernel_flops),
        )

    def _kernel_flops(self, program: Program, shape: Shape, remat: Remat) -> dict[str, float]:
        """Of one device and one run of each kernel; none where attention's products are among the program's others."""
        masks = {kernel: whole for kernel in program.kernels for name, whole in _KERNELS.items() if name in kernel}
        squares = shape.rows * shape.length**2 if any(masks.values()) else self._loader.squared_lengths[shape]
        forward_passes = 1 if remat == "none" else 2
        # The model's attention is a forward pass and a backward pass of two.
        share = (forward_passes + _BACKWARD_UNITS) / 3
        flops = share * attention_flops(self._model.config, squares) / self._mesh.size
        runs = sum(program.kernels[kernel] for kernel in masks)
        return dict.fromkeys(masks, flops / runs if runs else 0.0)

    def parameters(self) -> dict[str, str]:
        """As `TrainingPlan.parameters`."""
        leaves = jax.tree_util.tree_leaves_with_path(join(self._state.params, self._frozen))
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): (
                f"{leaf.shape} as {leaf.sharding.shard_shape(leaf.shape)}"
            )
            for path, leaf in leaves
        }
