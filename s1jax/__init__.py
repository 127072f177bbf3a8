"""s1 in JAX: fine-tune Qwen on reasoning traces, then control how long it thinks inside the compiled loop."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s1jax.decoding.api import Sampling, ThinkingBudget, generate, load

# Where there is no PyTorch transformers says so at each start; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = ["Sampling", "ThinkingBudget", "generate", "load"]


def __getattr__(name: str) -> Any:
    """Import jax and the decoder on first use, so that command lines answer --help at once."""
    if name in __all__:
        return getattr(import_module("s1jax.decoding.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
