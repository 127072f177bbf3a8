"""Peak host memory of reading a checkpoint: python benchmarks/load_memory.py MODEL_DIR [DTYPE]

Prints the weights' size as held, the process's memory before loading, its peak while loading, and what the peak exceeds
before + weights by, beside the size of the largest tensor.
"""

import sys
import time

import jax
import jax.numpy as jnp

from s1jax.config import ModelSection
from s1jax.device_memory import peak_resident_bytes
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.hf import load_params
from s1jax.model.load import build_model
from s1jax.paths import any_path

MIB = 2**20


def peak() -> float:
    """Largest resident size of this process so far, in MiB."""
    return peak_resident_bytes() / MIB


def main(path: str, dtype: str = "bfloat16") -> None:
    directory = any_path(path)
    model = build_model(ModelSection(path=path, dtype=dtype), QwenConfig.from_directory(directory), param_dtype=dtype)
    mesh = make_mesh()
    jax.block_until_ready(jnp.zeros(1))
    before, start = peak(), time.perf_counter()
    params = jax.block_until_ready(load_params(directory, model, mesh))
    seconds = time.perf_counter() - start
    arrays = jax.tree.leaves(params)
    layers = model.config.num_hidden_layers
    single = [a.nbytes / (layers if a.ndim > 1 and a.shape[0] == layers else 1) for a in arrays]
    weights = sum(a.nbytes for a in arrays) / MIB
    print(f"weights {weights:.0f} MiB as {dtype}, largest tensor {max(single) / MIB:.0f} MiB, read in {seconds:.1f} s")
    print(f"before {before:.0f} MiB, peak {peak():.0f} MiB, extra {peak() - before - weights:.0f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
