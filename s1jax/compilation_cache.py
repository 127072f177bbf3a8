"""Compiled programs kept on disk between runs."""

import os
from pathlib import Path

import jax


def keep_compilations() -> None:
    """Use jax's persistent compilation cache: JAX_COMPILATION_CACHE_DIR if set, else a directory of this user's."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "s1jax" / "compiled"))
