"""What decoding and training do most, as fast as a CPU reads or multiplies: the kernels in the folder `cpu`.

They are for processors with AVX-512, and compiled when they are first needed, in some seconds, and kept in the user's
cache. On other processors, and without a C++ compiler, XLA's own products are used.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from s1jax.compilation_cache import user_cache
from s1jax.mesh import platform

_FOLDER = Path(__file__).parent / "cpu"
MATMUL = "s1jax_matmul"
_FUNCTIONS = (
    *("s1jax_multiply", "s1jax_attend", "s1jax_look_up"),
    *(MATMUL, "s1jax_attention", "s1jax_attention_gradients"),
    *("s1jax_gated", "s1jax_gated_gradients", "s1jax_normalised", "s1jax_normalised_gradients"),
)
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl")
_FLAGS = (
    *("-O3", "-mtune=icelake-server", *(f"-m{name}" for name in _INSTRUCTIONS)),
    *("-std=c++17", "-shared", "-fPIC", "-w"),
)


def multiply(x: Float[Array, "rows inputs"], weight: Float[Array, "outputs inputs"]) -> Float[Array, "rows outputs"]:
    """`x` times the transposed `weight`, in float32; the weight has a dtype that is `available`. No gradients.

    For few rows, with which the time is that of reading the weight.
    """
    product: Array = _call("s1jax_multiply", (x.shape[0], weight.shape[0]), x, weight)
    return product


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


def matmul(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], *, transpose_a: bool = False, transpose_b: bool = False
) -> Float[Array, "_ _"]:
    """The product, in float32, of two matrices, each of them transposed or not. No gradients.

    For many rows, with which the time is that of multiplying; `b` has a dtype that is `available`.
    """
    shape = (a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])
    product: Array = _call(MATMUL, shape, a, b, transpose_a=transpose_a, transpose_b=transpose_b)
    return product


@jax.custom_vjp
def packed_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"],
) -> Float[Array, "batch length heads head_dim"]:
    """Causal softmax attention, scaled by 1/sqrt(head_dim), in float32, among neighbours with the same segment id.

    Tokens of the same id with others between them do not see each other. Of padding, id 0, the results are zeros.
    """
    return _packed_attention_forward(query, key, value, segment_ids)[0]


def _packed_attention_forward(query: Array, key: Array, value: Array, segment_ids: Array) -> tuple[Array, Any]:
    batch, length, heads, _ = query.shape
    operands = (query, key, value, segment_ids.astype(jnp.int32))
    context, normalisers = _call("s1jax_attention", (query.shape, (batch, heads, length)), *operands)
    return context, (*operands, context, normalisers)


def _packed_attention_backward(kept: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    shapes = tuple(x.shape for x in kept[:3])
    return (*_call("s1jax_attention_gradients", shapes, *kept, gradient), None)


packed_attention.defvjp(_packed_attention_forward, _packed_attention_backward)


def gated(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """silu(gate) * up, in float32 as both are. No gradients; `gated_gradients` has them."""
    product: Array = _call("s1jax_gated", gate.shape, gate, up)
    return product


def gated_gradients(gate: Array, up: Array, gradient: Array) -> tuple[Array, Array]:
    """The gradients with respect to `gate` and `up`, given that of `gated`."""
    gradients: tuple[Array, Array] = tuple(_call("s1jax_gated_gradients", (gate.shape, up.shape), gate, up, gradient))
    return gradients


def normalised(
    x: Float[Array, "*rows size"], scale: Float[Array, " size"], epsilon: float
) -> tuple[Float[Array, "*rows size"], Float[Array, "*rows 1"]]:
    """Root-mean-square normalisation, then scaled, and the inverse root mean squares; in float32 as both are.

    No gradients; `normalised_gradients` has them.
    """
    shapes = (x.shape, (*x.shape[:-1], 1))
    results: tuple[Array, Array] = tuple(_call("s1jax_normalised", shapes, x, scale, epsilon=np.float32(epsilon)))
    return results


def normalised_gradients(x: Array, scale: Array, inverse: Array, gradient: Array) -> tuple[Array, Array]:
    """The gradients with respect to `x` and `scale`, given that of what `normalised` returns first, and its second."""
    shapes = (x.shape, scale.shape)
    gradients: tuple[Array, Array] = tuple(_call("s1jax_normalised_gradients", shapes, x, scale, inverse, gradient))
    return gradients


def _call(function: str, shapes: Any, *arguments: Array, **attributes: bool | np.float32) -> Any:
    results = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x[0], int)
    )
    return jax.ffi.ffi_call(function, results)(*arguments, **attributes)


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
    """The shared library, compiled unless one of these sources and this jax is there."""
    files = sorted(_FOLDER.iterdir())
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files) + jax.__version__.encode()).hexdigest()[:16]
    library = user_cache() / f"cpu_kernel-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        sources = [str(file) for file in files if file.suffix == ".cc"]
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            built = Path(directory, library.name)
            command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            # Under its name only when it is whole: several processes may get here at once.
            built.replace(library)
    return library
