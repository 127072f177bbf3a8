"""What decoding does most, as fast as a CPU reads its weights and its cache: the kernel in cpu_kernel.cc.

It is for processors with AVX-512. It is compiled when it is first needed, in a few
seconds, and kept in the user's cache. On other processors, and without a C++ compiler, XLA's own products are used.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from s1jax.compilation_cache import user_cache
from s1jax.mesh import platform

_SOURCE = Path(__file__).with_suffix(".cc")
_FUNCTIONS = ("s1jax_multiply", "s1jax_attend", "s1jax_look_up")
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl")
_FLAGS = (
    *("-O3", "-mtune=icelake-server", *(f"-m{name}" for name in _INSTRUCTIONS)),
    *("-std=c++17", "-shared", "-fPIC", "-w"),
)


@jax.custom_vjp
def multiply(x: Float[Array, "rows inputs"], weight: Float[Array, "outputs inputs"]) -> Float[Array, "rows outputs"]:
    """`x` times the transposed `weight`, in float32, as `x` is; the weight has a dtype that is `available`."""
    return _call("s1jax_multiply", (x.shape[0], weight.shape[0]), x, weight)


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return multiply(x, weight), (x, weight)


def _backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = operands
    return gradient @ weight.astype(x.dtype), (gradient.T @ x).astype(weight.dtype)


multiply.defvjp(_forward, _backward)


def attend(
    query: Float[Array, "batch kv_heads queries head_dim"],
    keys: Float[Array, "batch kv_heads slots head_dim"],
    values: Float[Array, "batch kv_heads slots head_dim"],
    last: Int[Array, " batch"],
) -> Float[Array, "batch kv_heads queries head_dim"]:
    """Softmax attention of each row's queries over the slots 0..last of its cache; the others are not even read.

    Float32, as the query is, which is scaled already; the cache has a dtype that is `available`. No gradients.
    """
    return _call("s1jax_attend", query.shape, query, keys, values, last.astype(jnp.int32))


def look_up(table: Float[Array, "entries size"], ids: Int[Array, " ids"]) -> Float[Array, "ids size"]:
    """Entries of a table that has a dtype that is `available`, in float32. No gradients."""
    return _call("s1jax_look_up", (ids.shape[0], table.shape[1]), table, ids.astype(jnp.int32))


def _call(function: str, shape: tuple[int, ...], *arguments: Array) -> Array:
    result: Array = jax.ffi.ffi_call(function, jax.ShapeDtypeStruct(shape, jnp.float32))(*arguments)
    return result


def available(dtype: DTypeLike) -> bool:
    """Whether the kernel takes such a weight or cache where the program will run, which must be one device.

    The first call compiles it, or says why it cannot.
    """
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.size == 1
    return platform() == "cpu" and whole and dtype in (jnp.float32, jnp.bfloat16) and _register()


@functools.cache
def _register() -> bool:
    if not _processor_has(*_INSTRUCTIONS):
        return False
    named = os.environ.get("CXX", "c++")
    compiler = shutil.which(named)
    if compiler is None:
        return _unavailable(f"there is no C++ compiler called {named}; CXX names another")
    try:
        library = ctypes.CDLL(str(_library(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return _unavailable(f"{compiler}: {reason.strip()[-400:]}")
    for name in _FUNCTIONS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _processor_has(*instructions: str) -> bool:
    """Whether Linux, where the kernel was tried, lists these instructions."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return set(instructions) <= set(flags.split())


def _unavailable(reason: str) -> bool:
    print(f"s1jax: decoding on this CPU is slower than it could be: {reason}", file=sys.stderr)
    return False


def _library(compiler: str) -> Path:
    """The shared library, compiled unless one of this source and this jax is there."""
    key = hashlib.sha256(_SOURCE.read_bytes() + jax.__version__.encode()).hexdigest()[:16]
    library = user_cache() / f"cpu_kernel-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            built = Path(directory, library.name)
            command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            # Under its name only when it is whole: several processes may get here at once.
            built.replace(library)
    return library
