"""How much of a GPU's memory jax may take."""

import os

GPU_MEMORY_FRACTION = 0.94
"""The rest, about 5 GiB of an H100, is for the driver, CUDA libraries and NCCL."""


def use_most_of_gpu() -> None:
    """Let jax take that much, of which its own default is three quarters; before jax is imported.

    XLA_PYTHON_CLIENT_MEM_FRACTION in the environment wins. Only GPUs heed it.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))
