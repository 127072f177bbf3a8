"""Compiled programs kept on disk between runs."""

import os
from pathlib import Path

import jax


def keep_compilations() -> None:
    """Use jax's persistent compilation cache: JAX_COMPILATION_CACHE_DIR if set, else a directory of this user's."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(user_cache()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # The small programs too: a dozen of them cost a second of a start.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def user_cache() -> Path:
    """The directory of this user's compiled programs."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "s1jax" / "compiled"
