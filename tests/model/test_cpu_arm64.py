"""The kernels compiled for arm64 and run in an emulator, against this processor's, whose own tests hold formulas."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s1jax.config import Quantisation
from s1jax.model import cpu_kernel
from s1jax.model.quantisation import quantise
from s1jax.model.quantised_heads import quantised

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
TYPES = {"float32": 11, "bfloat16": 16, "int32": 4, "int8": 2, "int4": 21}
"""As XLA numbers them in xla/ffi/api/c_api.h."""

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"needs {COMPILER} and {EMULATOR} (qemu-user)"
)


class Call:
    """A call of one kernel: its name, arrays, shapes of its results, which are float32 unless said, and attributes."""

    def __init__(self, name: str, arrays: list[Any], results: list[Any], **attributes: bool):
        self.name, self.arrays, self.attributes = name, arrays, attributes
        self.results = [
            jax.ShapeDtypeStruct(shape, jnp.float32) if type(shape) is tuple else shape for shape in results
        ]

    def bytes(self) -> bytes:
        arrays = [np.asarray(array) for array in self.arrays]
        shapes = [(TYPES[array.dtype.name], len(array.shape), *array.shape) for array in (*arrays, *self.results)]
        head = [cpu_kernel.FUNCTIONS.index(self.name), len(arrays), len(self.results), len(self.attributes)]
        numbers = [*head, *self.attributes.values(), *(number for shape in shapes for number in shape)]
        return b"".join([np.array(numbers, np.int64).tobytes(), *(_in_memory(array) for array in arrays)])

    def here(self) -> list[jax.Array]:
        assert cpu_kernel.available(jnp.float32)
        return list(jax.ffi.ffi_call(self.name, self.results)(*map(jnp.asarray, self.arrays), **self.attributes))


def _in_memory(array: np.ndarray) -> bytes:
    """An array's bytes as XLA has them: of integers of four bits two in each, the first in its lower half."""
    if array.dtype.name != "int4":
        return array.tobytes()
    lower, upper = array.astype(np.int8).reshape(-1, 2).T & 15
    return (lower | upper << 4).astype(np.uint8).tobytes()


def calls() -> Iterator[Call]:
    rng = np.random.default_rng(0)

    def normal(*shape: int, half: bool = False) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16 if half else jnp.float32)

    for case in range(40):
        half = case % 2 == 1
        rows, inputs, outputs = (int(rng.integers(1, most)) for most in (40, 1100, 90))
        no_scale = jnp.zeros((0, 0))
        weight = normal(outputs, inputs, half=half)
        yield Call("s1jax_multiply", [normal(rows, inputs), weight, no_scale], [(rows, outputs)])

        kind: Quantisation = "int8" if half else "int4"
        size = int(rng.integers(1, 20)) * 32
        integers, scales = quantise(np.asarray(normal(outputs, size)), kind)
        operands = [normal(rows, size) / 64, integers, no_scale if half else scales]
        yield Call("s1jax_multiply", operands, [(rows, outputs)])
        yield Call("s1jax_matmul", operands, [(rows, outputs)], transpose_a=False, transpose_b=True)

        a, b = bool(case & 2), bool(case & 4)
        operands = [normal(inputs, rows) if a else normal(rows, inputs)]
        operands += [normal(outputs, inputs, half=half) if b else normal(inputs, outputs, half=half), no_scale]
        yield Call("s1jax_matmul", operands, [(rows, outputs)], transpose_a=a, transpose_b=b)

        batch, kv_heads, group, slots, size = (int(rng.integers(1, most)) for most in (4, 4, 10, 150, 140))
        pages = int(rng.integers(1, 4))
        query, cache = (batch, kv_heads, group, size), (kv_heads, batch * pages, slots, size)
        table = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
        last = rng.integers(0, pages * slots, batch).astype(np.int32)
        keys, values = (normal(*cache, half=half) for _ in range(2))
        none = jnp.zeros((0, 0, 0))
        yield Call("s1jax_attend", [normal(*query), keys, none, values, none, table, last], [query])
        int8 = (*quantised(keys), *quantised(values))
        yield Call("s1jax_attend", [normal(*query), *int8, table, last], [query])

        # As many tokens as there are places: a result is not a copy of the argument here.
        tokens, first = normal(batch, pages * slots, kv_heads, size), np.zeros(batch, np.int32)
        yield Call("s1jax_write", [jnp.zeros(cache), tokens, table, first], [cache])

        scores, allowed = normal(rows, inputs), rng.integers(0, 2, (2, inputs)).astype(np.int8)
        whole = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 2), (rows,))]
        yield Call("s1jax_survey", [scores, allowed], [*whole, (rows,)])

        query, key = (batch, slots, kv_heads * group, size), (batch, slots, kv_heads, size)
        segments = np.sort(rng.integers(0, 4, (batch, slots)).astype(np.int32))
        packed = [normal(*query), normal(*key), normal(*key), segments]
        yield Call("s1jax_attention", packed, [query])
        yield Call("s1jax_attention_gradients", [*packed, normal(*query)], [query, key, key])


@pytest.mark.slow
def test_the_kernels_compute_the_same_on_arm64(tmp_path: Path) -> None:
    program = str(tmp_path / "program")
    sources = [Path(__file__).with_name("call_kernels.cc"), *cpu_kernel.FOLDER.glob("*.cc")]
    command = [COMPILER, *cpu_kernel.FLAGS, "-static", f"-I{jax.ffi.include_dir()}", *map(str, sources), "-o", program]
    subprocess.run(command, check=True)
    made = list(calls())
    run = subprocess.run(
        [EMULATOR, program], input=b"".join(call.bytes() for call in made), check=True, stdout=subprocess.PIPE
    )
    at = 0
    for call in made:
        for here, result in zip(call.here(), call.results, strict=True):
            there = np.frombuffer(run.stdout, result.dtype, result.size, at).reshape(result.shape)
            at += there.nbytes
            np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4, err_msg=call.name)
    assert at == len(run.stdout)
