"""The run: data in, steps, checkpoints, metrics, and a Hugging Face directory at the end."""

import hashlib
import importlib.metadata
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from s1jax.config import Quantisation
from s1jax.config_reader import ConfigError, to_dict
from s1jax.data.examples import Dataset, Example, load_examples
from s1jax.data.loader import StepLoader
from s1jax.data.packing import Batch, Shape
from s1jax.device_memory import keep_freed_memory
from s1jax.mesh import batch_shards, make_mesh, process_row_shard
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_adapter, export_model, is_exported
from s1jax.model.flops import peak_flops, training_flops
from s1jax.model.hf import load_params
from s1jax.model.hf_files import resolve_model
from s1jax.model.kernel_check import checked
from s1jax.model.load import build_model, needs_original
from s1jax.model.lora import join, lora_of
from s1jax.model.qwen import Params, Qwen
from s1jax.paths import AnyPath, any_path, free_bytes
from s1jax.processes import agree_each, same_everywhere, see_same_directory, start_processes, together
from s1jax.tokenizer import checked_vocabulary, load_tokenizer
from s1jax.training.checkpoint import Cadence, Checkpoints
from s1jax.training.config import TrainConfig, TrainedModelSection
from s1jax.training.metrics import Tracker, check_trackers, open_trackers, save_provenance
from s1jax.training.programs import compile_all
from s1jax.training.run_directory import RunError, check_config, exclusive, settings
from s1jax.training.step import (
    StepMetrics,
    TrainState,
    abstract_frozen,
    abstract_state,
    batch_sharding,
    compile_loss,
    compile_step,
    init_state,
)
from s1jax.training.termination import TERMINATED, Termination

_COMPILED_WITH_INT4 = (0, 12)
"""From this jax on, a program that was compiled before its arguments were there takes those of four bits."""
PAD_TOKEN = "<|fim_pad|>"


def train(config: TrainConfig) -> int:
    """Train as configured, going on from the last checkpoint in the output directory; returns the exit status.

    Raises ValueError, OSError or RuntimeError with a message for the person who started the run.
    """
    start_processes(config.mesh)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    directory = any_path(config.training.output_dir)
    with ExitStack() as stack:
        together(lambda: stack.enter_context(exclusive(directory)))
        see_same_directory(directory)
        if is_exported(directory / "model"):
            print(f"{directory}/model is there: this run is finished")
            return 0
        run = together(lambda: _Run(config, directory))
        run.agree()
        return run.execute()


def training_model(config: TrainConfig, architecture: QwenConfig) -> Qwen:
    """The model as it is trained: what is trained is float32 unless the configuration says else.

    Raises ConfigError if the adapters that it asks for do not fit the model, or what is frozen cannot be as it says.
    """
    section = config.model
    lora = lora_of(section.lora, architecture)
    if section.base_dtype and not lora:
        raise ConfigError("model.base_dtype: all weights are trained, none is frozen: set model.lora.rank too")
    needs_original("model.base_dtype", section.base_dtype, architecture)
    quantisation: Quantisation | None = architecture.quantisation
    if quantisation and not lora:
        raise ConfigError(f"model.path: the model's weights are {quantisation}, of which only adapters can be trained")
    model = build_model(section, architecture, param_dtype="float32", remat=section.remat)
    if section.base_dtype in ("int8", "int4"):
        quantisation = section.base_dtype
    if quantisation == "int4" and jax.__version_info__ < _COMPILED_WITH_INT4:
        key = "model.path" if architecture.quantisation else "model.base_dtype"
        raise ConfigError(f"{key}: int4 needs jax 0.12, this is {jax.__version__}: take int8")
    dtype = "bfloat16" if quantisation else section.base_dtype or "bfloat16"
    return replace(model, lora=lora, base_dtype=jnp.dtype(dtype), quantisation=quantisation)


def for_rows(model: Qwen, section: TrainedModelSection, length: int) -> Qwen:
    """The model with what the configuration has the forward pass keep of rows of this length."""
    by_length = section.remat_by_length or {}
    limits = [limit for limit in by_length if length <= limit]
    return replace(model, remat=by_length[min(limits)] if limits else section.remat)


def step_loader(
    config: TrainConfig,
    examples: Sequence[Example],
    mesh: Mesh,
    row_shard: tuple[int, int],
    pad_id: int,
    *,
    evaluation: bool = False,
) -> StepLoader:
    """The steps of a run on this mesh, or of one pass over held-out examples; see `StepLoader`."""
    microbatches = config.training.gradient_accumulation_steps
    return StepLoader(
        examples,
        batch_size=config.training.batch_size,
        num_epochs=1 if evaluation else config.training.num_epochs,
        shuffle=config.data.shuffle and not evaluation,
        seed=config.training.seed,
        packing=config.data.packing or evaluation,
        loss_average=config.training.loss_average,
        max_row_length=max(config.data.block_size, config.data.max_row_length or 0),
        num_microbatches=microbatches,
        num_shards=batch_shards(mesh) * microbatches,
        row_shard=row_shard,
        pad_id=pad_id,
        fill_last=not evaluation,
    )


class _Run:
    """One process's part of a training run."""

    def __init__(self, config: TrainConfig, directory: AnyPath):
        self.config, self.directory = config, directory
        check_trackers(config.logging, directory)
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        self.source = resolve_model(config.model.path)
        self.model = checked(training_model(config, QwenConfig.from_directory(self.source)), gradients=True)
        self.model.abstract_params(self.mesh)  # Refuses a mesh that does not fit before the data is read.
        tokenizer = load_tokenizer(self.source)
        checked_vocabulary(tokenizer, self.model.config.vocab_size)
        self.pad_id = tokenizer.convert_tokens_to_ids(PAD_TOKEN) or 0
        block_size, overlong = config.data.block_size, config.data.overlong
        dataset = load_examples(config.data.path, tokenizer, block_size=block_size, overlong=overlong)
        held_out = config.data.eval_path
        self.eval_loader = (
            self._loader(
                load_examples(held_out, tokenizer, block_size=block_size, overlong=overlong).examples, evaluation=True
            )
            if held_out
            else None
        )
        self.loader = self._loader(dataset.examples)
        self.total_steps = min(len(self.loader), config.training.max_steps or len(self.loader))
        self._steps_by_shape: dict[Shape, Compiled] = {}
        self._losses_by_shape: dict[Shape, Compiled] = {}
        self._frozen: Params = {}
        self._dataset, self._fingerprint = dataset, _fingerprint(dataset.examples)

    def agree(self) -> None:
        """Check that all processes are one run, and that it may go on in its directory; say what it is.

        Raises ProcessError or RunError.
        """
        facts = {**settings(self.config), "data fingerprint": self._fingerprint, **_versions()}
        facts["attention that is used"] = self.model.attention
        # Each has its own number, and not every host a copy of the repository.
        same_everywhere({key: str(facts[key]) for key in facts.keys() - {"mesh.process_id", "commit"}})
        together(lambda: check_config(self.directory, self.config, self._fingerprint))
        if jax.process_index() == 0:
            self._describe(self._dataset)

    def _loader(self, examples: list[Example], evaluation: bool = False) -> StepLoader:
        return step_loader(
            self.config, examples, self.mesh, process_row_shard(self.mesh), self.pad_id, evaluation=evaluation
        )

    def _describe(self, dataset: Dataset) -> None:
        print(dataset.summary)
        print(f"padding: {self.loader.padding_share:.1%} of all positions")
        shapes = ", ".join(f"{rows} x {length} ({n} steps)" for (rows, length), n in sorted(self.loader.shapes.items()))
        print(f"{self.total_steps} steps; rows x length, one compilation each: {shapes}")
        print(self._storage(), flush=True)
        save_provenance(self.directory / "provenance.json", to_dict(self.config), _versions())

    def _storage(self) -> str:
        """What checkpoints take, where they go, and how often one is written."""
        state = abstract_state(self.model, self.config.optimizer, self.mesh)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 1e9
        section, free = self.config.checkpoint, free_bytes(self.directory)
        room = "" if free is None else f", {free / 1e9:,.1f} GB are free there"
        return f"{Cadence(section)}: {size:,.3f} GB each, {section.keep} kept and one being written{room}"

    def execute(self) -> int:
        checkpoints = Checkpoints(
            self.directory / "checkpoints", self.directory / "damaged-checkpoints", self.config.checkpoint.keep
        )
        with jax.set_mesh(self.mesh), Termination() as termination:
            state, self._frozen = self._start(checkpoints)
            together(lambda: self._compile(int(state.step)))
            trackers = self._trackers(int(state.step))
            state = self._steps(state, checkpoints, trackers, termination)
            for tracker in trackers:
                tracker.close()
            checkpoints.close()
            finished = int(state.step) == self.total_steps
            if finished:
                termination.saving()
                self._export(state)
        if jax.process_index() == 0:
            if finished:
                print(f"finished: {self.directory / 'model'}", flush=True)
            else:
                print(
                    f"terminated; saved after step {int(state.step)}, the same command goes on from there", flush=True
                )
        return 0 if finished else TERMINATED

    def _export(self, state: TrainState) -> None:
        params, dtype = join(state.params, self._frozen), self.config.training.export_dtype
        if self.model.lora:
            export_adapter(self.directory / "adapter", self.model, params, base=self.config.model.path)
        export_model(self.directory / "model", self.model, params, source=self.source, dtype=dtype)

    def _start(self, checkpoints: Checkpoints) -> tuple[TrainState, Params]:
        """The state to go on from, and the parameters that are frozen."""
        section, lora = self.config.optimizer, self.model.lora
        restored = checkpoints.restore(abstract_state(self.model, section, self.mesh))
        read: Params = {}
        if restored is None or lora:
            read = together(lambda: load_params(self.source, self.model, self.mesh))
        frozen = read if lora else {}
        if restored is None:
            key = jax.random.key(self.config.training.seed)
            trained = self.model.init_trained(key, self.mesh) if lora else read
            return init_state(self.model, section, self.mesh, trained), frozen
        self.loader.set_state(restored.loader)
        if jax.process_index() == 0:
            print(f"going on from the checkpoint of step {int(restored.state.step)}", flush=True)
        return restored.state, frozen

    def _compile(self, first_step: int) -> None:
        """Compile what the steps after that one need. Raises RunError where the device has no room for them."""
        started = time.perf_counter()
        section, sharding = self.config.optimizer, batch_sharding(self.mesh)
        state, frozen = abstract_state(self.model, section, self.mesh), abstract_frozen(self.model, self.mesh)

        def lower_step(shape: Shape) -> Lowered:
            model = for_rows(self.model, self.config.model, shape.length)
            step = compile_step(model, section, self.total_steps, self.mesh)
            return step.lower(state, frozen, self.loader.abstract_batch(shape, sharding))

        self._steps_by_shape = compile_all(lower_step, self.loader.shapes_of(range(first_step, self.total_steps)))
        if held_out := self.eval_loader:
            loss = compile_loss(self.model, self.mesh)

            def lower_loss(shape: Shape) -> Lowered:
                return loss.lower(state.params, frozen, held_out.abstract_batch(shape, sharding))

            self._losses_by_shape = compile_all(lower_loss, held_out.shapes)
        if jax.process_index() == 0:
            print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)

    def _trackers(self, first_step: int) -> list[Tracker]:
        if jax.process_index():
            return []
        return open_trackers(self.config.logging, self.directory, to_dict(self.config), first_step, self.total_steps)

    def _steps(
        self, state: TrainState, checkpoints: Checkpoints, trackers: list[Tracker], termination: Termination
    ) -> TrainState:
        """Take steps until all are taken, or the run is told to end and has been saved."""
        training, cadence = self.config.training, Cadence(self.config.checkpoint)
        bad_steps = 0
        for step in range(int(state.step) + 1, self.total_steps + 1):
            started = time.perf_counter()
            batch = self._to_devices(next(self.loader))
            state, metrics = jax.block_until_ready(self._steps_by_shape[_shape(batch)](state, self._frozen, batch))
            numbers = self._numbers(step, batch, metrics, time.perf_counter() - started)
            bad_steps = 0 if metrics.finite else bad_steps + 1
            if self.eval_loader and (step % training.eval_every == 0 or step == self.total_steps):
                numbers["eval_loss"] = self._evaluate(state.params)
            for tracker in trackers:
                tracker.log(step, numbers)
            if bad_steps >= training.max_bad_steps:
                checkpoints.wait()
                raise RunError(
                    f"loss or gradients were not finite for {bad_steps} steps in a row, up to step {step}: stopped. "
                    f"The last checkpoint is that of step {checkpoints.latest_step()}"
                )
            termination.alive()
            # By the first process's clock: the others' may differ.
            stop, due = agree_each([termination.requested, jax.process_index() == 0 and cadence.due(step)])
            checkpoints.poll()
            if stop:
                termination.saving()
            # After the last step the model itself is written.
            if stop or (due and step != self.total_steps):
                # First the lines of the steps before it: a run that goes on from there adds later ones only.
                for tracker in trackers:
                    tracker.flush()
                checkpoints.save(state, self.loader.get_state())
                cadence.saved()
            if stop:
                break
        return state

    def _to_devices(self, batch: Batch) -> Batch:
        """This process's rows as its part of arrays that span the mesh."""
        sharding = batch_sharding(self.mesh)
        _, parts = process_row_shard(self.mesh)

        def place(local: np.ndarray) -> jax.Array:
            microbatches, rows, columns = local.shape
            return jax.make_array_from_process_local_data(sharding, local, (microbatches, rows * parts, columns))

        return Batch(*map(place, batch))

    def _numbers(self, step: int, batch: Batch, metrics: StepMetrics, seconds: float) -> dict[str, float]:
        counts = self.loader.counts(step - 1)
        numbers = {
            "loss": float(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": float(metrics.grad_norm),
            "skipped": float(not metrics.finite),
            "trained_tokens": counts.trained_tokens,
            "padding_share": 1 - counts.tokens / batch.input_ids.size,
            "seconds": seconds,
            "tokens_per_second": counts.tokens / seconds,
        }
        peak = peak_flops(device.device_kind for device in self.mesh.devices.flat)
        if peak:
            flops = training_flops(self.model.config, self.model.lora, counts.tokens, counts.squared_lengths)
            numbers["mfu"] = flops / seconds / peak
        return numbers

    def _evaluate(self, params: Params) -> float:
        """Mean loss over the held-out examples, averaged as in training."""
        assert self.eval_loader is not None
        self.eval_loader.set_state({**self.eval_loader.get_state(), "step": 0})
        total = weight = 0.0
        for step, batch in enumerate(self.eval_loader):
            counts = self.eval_loader.counts(step)
            share = counts.examples if self.config.training.loss_average == "sample" else counts.trained_tokens
            batch = self._to_devices(batch)
            total += share * float(self._losses_by_shape[_shape(batch)](params, self._frozen, batch))
            weight += share
        return total / weight


def _shape(batch: Batch) -> Shape:
    microbatches, rows, length = batch.input_ids.shape
    return Shape(microbatches * rows, length)


def _fingerprint(examples: list[Example]) -> str:
    """A digest of all token ids and masks, by which a resumed run knows its data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.input_ids.tobytes())
        digest.update(example.loss_mask.tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    """Packages and the commit that this run is made with."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "s1jax")
    versions = {name: _version(name) for name in names}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {**versions, "commit": commit or "unknown"}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # Run from a checkout on the path.
