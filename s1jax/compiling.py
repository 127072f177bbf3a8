"""Compiling a program for a device's memory, and how much of it the program takes."""

from typing import Any

from jax.errors import JaxRuntimeError
from jax.stages import Compiled, Lowered


class NoRoomError(RuntimeError):
    """The compiler found no room for a program; what it says of that."""


def compile_within_memory(lowered: Lowered) -> Compiled:
    """Compile. Raises NoRoomError if the compiler finds no room for it, which for GPUs it does not look for."""
    try:
        return lowered.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = str(error).splitlines()
        raise NoRoomError(next((line for line in lines if "Used" in line), lines[0]).strip()) from None


def temporaries(compiled: Any, platform: str) -> int:
    """Bytes that a compiled program needs beside its arguments, results that take over an argument's place aside.

    On TPU all temporaries together are far more than are there at once, and the compiler's own peak counts.
    """
    analysis = compiled.memory_analysis()
    if platform == "tpu":
        return int(analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes)
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
