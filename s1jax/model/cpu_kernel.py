"""What decoding and training do most, as fast as a CPU reads or multiplies: the kernels in the folder `cpu`.

They are compiled for the processor at hand when they are first needed, in some seconds, and kept in the user's cache.
Without a C++ compiler, XLA's own products are used. $S1JAX_CPU_VECTOR_BYTES has them compiled for narrower vectors than
the processor's: 32 are AVX2's, 16 are NEON's.
"""

import ctypes
import functools
import hashlib
import os
import platform as host
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from s1jax.compilation_cache import user_cache
from s1jax.mesh import platform
from s1jax.model.quantised_heads import Quantised

FOLDER = Path(__file__).parent / "cpu"
MATMUL = "s1jax_matmul"
MULTIPLY = "s1jax_multiply"
TILES = "s1jax_multiply_tiles"
_GATE_TILES = "s1jax_gate_tiles"
_DECODING = (MULTIPLY, "s1jax_attend", "s1jax_write", "s1jax_survey")
FUNCTIONS = (*_DECODING, MATMUL, "s1jax_attention", "s1jax_attention_gradients")
_ARM = host.machine() in ("aarch64", "arm64")
# Bytes of vectors that $S1JAX_CPU_VECTOR_BYTES may ask for: an arm64 processor has the narrowest anyway.
NARROWER = () if _ARM else ("16", "32")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp-simd", "-w")
_LIBRARY = ("-shared", "-fPIC", "-mcpu=native" if _ARM else "-march=native")


def multiply(
    x: Float[Array, "rows inputs"],
    weight: Shaped[Array, "outputs inputs"],
    scale: Float[Array, "outputs groups"] | None = None,
) -> Float[Array, "rows outputs"]:
    """`x` times the transposed `weight`, which has a dtype that is `available`, in float32. No gradients.

    `x` is float32, or where there are such products (`has_pairs`), bfloat16. A weight of integers has a scale. For few
    rows, with which the time is that of reading the weight; of bfloat16 for any number.
    """
    return _product(MULTIPLY, jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32), x, weight, scale)


def multiply_by_tiles(
    x: Float[Array, "rows inputs"],
    weight: Shaped[Array, "outputs inputs"],
    scale: Float[Array, "outputs groups"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "rows outputs"]:
    """The same of an `x` of bfloat16, in float32 or bfloat16, by the processor's matrix units (`has_tiles`)."""
    return _product(TILES, jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), dtype), x, weight, scale)


def multiply_gated(
    x: Float[Array, "rows inputs"], gate: Float[Array, "outputs inputs"], up: Float[Array, "outputs inputs"]
) -> Float[Array, "rows outputs"]:
    """silu of `x` times the transposed `gate`, times `x` times the transposed `up`: all of bfloat16. No gradients.

    By the processor's matrix units, which must be there (`has_tiles`).
    """
    result = jax.ShapeDtypeStruct((x.shape[0], gate.shape[0]), jnp.bfloat16)
    product: Array = jax.ffi.ffi_call(_GATE_TILES, result)(x, gate, up)
    return product


def attend(
    query: Float[Array, "batch kv_heads queries head_dim"],
    keys: Float[Array, "kv_heads pages slots head_dim"] | Quantised,
    values: Float[Array, "kv_heads pages slots head_dim"] | Quantised,
    table: Int[Array, "batch row_pages"],
    last: Int[Array, " batch"],
) -> Float[Array, "batch kv_heads queries head_dim"]:
    """Softmax attention of each row's queries over its tokens 0..last; pages of the table after them are not even read.

    Float32, as the query is, which is scaled already; the pages have a dtype that is `available`. No gradients.
    """
    none = jnp.zeros((0, 0, 0))
    (keys, of_keys), (values, of_values) = (x if isinstance(x, Quantised) else (x, none) for x in (keys, values))
    places = table.astype(jnp.int32), last.astype(jnp.int32)
    return _call("s1jax_attend", query.shape, query, keys, of_keys, values, of_values, *places)


def write(
    pages: Shaped[Array, "kv_heads pages slots *head_dim"],
    tokens: Shaped[Array, "batch length kv_heads *head_dim"],
    table: Int[Array, "batch row_pages"],
    first: Int[Array, " batch"],
) -> Shaped[Array, "kv_heads pages slots *head_dim"]:
    """The pages, updated in place, with tokens at a row's positions from `first` on, but for those beyond the table.

    XLA's own scatter widens all of a half-precision cache before it writes to it.
    """
    result = jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    call = jax.ffi.ffi_call("s1jax_write", result, input_output_aliases={0: 0})
    written: Array = call(pages, tokens.astype(pages.dtype), table.astype(jnp.int32), first.astype(jnp.int32))
    return written


def survey(
    scores: Float[Array, "rows ids"], allowed: Bool[Array, "two ids"], *, with_total: bool
) -> tuple[Int[Array, "rows two"], Bool[Array, " rows"], Float[Array, " totals"]]:
    """What one reading of float32 scores tells of each row.

    The first with the greatest score of the ids that each set allows; whether all are finite; and `with_total` the
    logarithm of the sum of their exponentials, else nothing.
    """
    rows = scores.shape[0]
    greatest, finite = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 2), (rows,)))
    total = jax.ShapeDtypeStruct((rows if with_total else 0,), jnp.float32)
    best, is_finite, log_total = jax.ffi.ffi_call("s1jax_survey", (greatest, finite, total))(
        scores, allowed.astype(jnp.int8)
    )
    return best, is_finite > 0, log_total


def matmul(
    a: Float[Array, "_ _"],
    b: Shaped[Array, "_ _"],
    scale: Float[Array, "outputs groups"] | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> Float[Array, "_ _"]:
    """The product, in float32, of two matrices, each of them transposed or not. No gradients.

    For many rows, with which the time is that of multiplying; `b` has a dtype that is `available`. One of integers is
    transposed, and has a scale.
    """
    shape = (a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return _product(MATMUL, result, a, b, scale, transpose_a=transpose_a, transpose_b=transpose_b)


def _product(
    function: str, result: jax.ShapeDtypeStruct, a: Array, b: Array, scale: Array | None, **how: bool
) -> Array:
    in_kernel = scale is not None and b.dtype == jnp.int4
    product: Array = jax.ffi.ffi_call(function, result)(a, b, scale if in_kernel else jnp.zeros((0, 0)), **how)
    return product if scale is None or in_kernel else product * scale[:, 0]


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
    operands = (query, key, value, segment_ids.astype(jnp.int32))
    context: Array = _call("s1jax_attention", query.shape, *operands)
    return context, operands


def _packed_attention_backward(operands: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    shapes = tuple(x.shape for x in operands[:3])
    return (*_call("s1jax_attention_gradients", shapes, *operands, gradient), None)


packed_attention.defvjp(_packed_attention_forward, _packed_attention_backward)


def _call(function: str, shapes: Any, *arguments: Array) -> Any:
    results = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x[0], int)
    )
    return jax.ffi.ffi_call(function, results)(*arguments)


def available(dtype: DTypeLike) -> bool:
    """Whether the kernel takes such a weight or cache where the program will run, which must be one device.

    The first call compiles it, or says why it cannot.
    """
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.size == 1
    return (
        platform() == "cpu"
        and whole
        and dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4)
        and _library() is not None
    )


def has_tiles() -> bool:
    """Whether there is `multiply_by_tiles`: on one device whose processor has matrix units for bfloat16."""
    library = _library() if available(jnp.bfloat16) else None
    return library is not None and bool(library.s1jax_tiles())


def has_pairs() -> bool:
    """Whether `multiply` takes an `x` of bfloat16: on one device whose processor multiplies vectors of it."""
    library = _library() if available(jnp.bfloat16) else None
    return library is not None and bool(ctypes.c_int.in_dll(library, "s1jax_pairs").value)


def vector_bytes() -> int | None:
    """The width of the kernels' vectors; None where the program will run without them."""
    library = _library() if available(jnp.float32) else None
    return ctypes.c_int.in_dll(library, "s1jax_vector_bytes").value if library else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels, known to jax; without them a line says why."""
    named = os.environ.get("CXX", "c++")
    compiler = shutil.which(named)
    try:
        if compiler is None:
            raise OSError(f"there is no C++ compiler called {named}; CXX names another")
        library = ctypes.CDLL(str(_compiled([compiler, *FLAGS, *_LIBRARY, *_narrower()])))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = f"{compiler}: {error.stderr}" if isinstance(error, subprocess.CalledProcessError) else str(error)
        print(f"s1jax: this CPU is slower than it could be: {reason.strip()[-400:]}", file=sys.stderr)
        return None
    for name in (*FUNCTIONS, TILES, _GATE_TILES) if library.s1jax_tiles() else FUNCTIONS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


def _narrower() -> tuple[str, ...]:
    """What $S1JAX_CPU_VECTOR_BYTES asks the compiler for."""
    asked = os.environ.get("S1JAX_CPU_VECTOR_BYTES")
    if asked not in (None, *NARROWER):
        widths = " or ".join(NARROWER) or "no other width than the processor's"
        raise ValueError(f"S1JAX_CPU_VECTOR_BYTES={asked}: {widths}, or without it the widest there are")
    # As on a processor without AVX-512, whose registers are half as many, too.
    return ("-mno-avx512f", f"-DS1JAX_VECTOR_BYTES={asked}") if asked else ()


def _compiled(command: list[str]) -> Path:
    """The shared library, compiled unless it is there of these sources, jax, compiler and kind of processor."""
    # The compiler names them all where it says what it defines.
    macros = subprocess.run(
        [*command, "-dM", "-E", "-x", "c++", "-"], stdin=subprocess.DEVNULL, check=True, capture_output=True, text=True
    ).stdout
    files = sorted(FOLDER.iterdir())
    parts = (*(file.read_bytes() for file in files), jax.__version__.encode(), *(map(str.encode, (*command, macros))))
    library = user_cache() / f"cpu_kernel-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        sources = [str(file) for file in files if file.suffix == ".cc"]
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            built = Path(directory, library.name)
            command = [*command, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            # Under its name only when it is whole: several processes may get here at once.
            built.replace(library)
    return library
