"""This project as a contender: `s1jax.generate`, as its users call it."""

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.throughput.contenders.protocol import serve
from benchmarks.throughput.contest import THREADS
from s1jax import ThinkingBudget, generate, load
from s1jax.compilation_cache import keep_compilations
from s1jax.config import ModelSection
from s1jax.decoding.profiles import DelimiterProfile
from s1jax.mesh import make_mesh
from s1jax.model import cpu_kernel
from s1jax.model.config import QwenConfig
from s1jax.model.hf import load_params
from s1jax.model.qwen import Qwen
from s1jax.training.config import DataSection, OptimizerSection

_UNENDING = DelimiterProfile(name="unending", eos=("<|fim_pad|>",))
"""Its answers end with a token that no model writes on its own."""


class S1jax:
    def load(self, model: str, dtype: str, **_: int) -> dict[str, str]:
        """Read the model; returns the versions of what runs it."""
        keep_compilations()
        self._loaded = load(ModelSection(path=model, dtype=dtype))
        jax.block_until_ready(self._loaded.params)
        return self._versions()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Exactly `new_tokens` greedy tokens for each prompt, all prompts at once."""
        budget = ThinkingBudget(max_answer_tokens=new_tokens)
        results = generate(self._loaded, prompts, budget, profile=_UNENDING, batch_size=len(prompts))
        return [result.output_ids for result in results]

    def force(
        self, prompts: list[list[int]], batch_size: int, thinking: int, waits: int, answer: int, **_: list[int]
    ) -> list[int]:
        """Generate under a thinking budget with waits, inside the graph; returns each row's number of new tokens."""
        budget = ThinkingBudget(thinking, num_ignore=waits, max_answer_tokens=answer)
        results = generate(self._loaded, prompts, budget, batch_size=batch_size)
        return [len(result.output_ids) for result in results]

    def read(self) -> float:
        """Seconds to read what a decode step of one row reads: each weight's maximum, the best of five times."""
        weights = [np.asarray(weight).reshape(-1).view(np.int64) for weight in jax.tree.leaves(self._loaded.params)]
        seconds = []
        with ThreadPoolExecutor(THREADS) as readers:
            for _ in range(5):
                started = time.perf_counter()
                list(readers.map(np.max, weights))
                seconds.append(time.perf_counter() - started)
        return min(seconds)

    def load_for_training(self, model: str, dtype: str, **_: int) -> dict[str, str]:
        """Read the model and make an optimiser's state beside it; returns the versions of what runs it."""
        # Here: who decodes does not import what trains, and a start counts imports.
        from s1jax.device_memory import keep_freed_memory
        from s1jax.training.step import compile_step, init_state

        keep_compilations()
        keep_freed_memory()
        self._mesh = make_mesh()
        qwen = Qwen(QwenConfig.from_directory(Path(model)), dtype=jnp.dtype(dtype))
        with jax.set_mesh(self._mesh):
            params = load_params(Path(model), qwen, self._mesh)
            self._state = init_state(qwen, OptimizerSection(), self._mesh, params)
            self._step = compile_step(qwen, OptimizerSection(), 1000, self._mesh)
        return self._versions()

    @staticmethod
    def _versions() -> dict[str, str]:
        versions = {name: version(name) for name in ("s1jax", "jax", "jaxlib")}
        return {**versions, "kernels in vectors of bytes": str(cpu_kernel.vector_bytes())}

    def train(self, examples: list[list[int]], batch_size: int, **_: int) -> float:
        """One pass of optimiser steps over the examples, packed as `train.py` packs them; returns the last loss."""
        from s1jax.data.examples import Example
        from s1jax.data.loader import StepLoader
        from s1jax.training.step import batch_sharding

        loader = StepLoader(
            [Example(np.array(ids, np.int32), np.arange(len(ids)) > 0) for ids in examples],
            batch_size=batch_size,
            num_epochs=1,
            shuffle=False,
            seed=0,
            packing=True,
            loss_average="token",
            max_row_length=DataSection(path="").block_size,
            num_microbatches=1,
            num_shards=1,
            row_shard=(0, 1),
            pad_id=0,
        )
        with jax.set_mesh(self._mesh):
            for batch in loader:
                self._state, metrics = self._step(self._state, {}, jax.device_put(batch, batch_sharding(self._mesh)))
            return float(metrics.loss)


if __name__ == "__main__":
    contender = S1jax()
    serve(
        {
            "load": contender.load,
            "generate": contender.generate,
            "force": contender.force,
            "read": contender.read,
            "load_for_training": contender.load_for_training,
            "train": contender.train,
        }
    )
