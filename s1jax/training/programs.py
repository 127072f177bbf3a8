"""Programs for every shape of rows that a run has, compiled before its first step."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.stages import Compiled, Lowered

from s1jax.compiling import NoRoomError, compile_within_memory, temporaries
from s1jax.data.packing import Shape
from s1jax.device_memory import GIB, limit_bytes
from s1jax.training.run_directory import RunError


def compile_all(lower: Callable[[Shape], Lowered], shapes: Iterable[Shape]) -> dict[Shape, Compiled]:
    """Compile a program for each shape, all at the same time: one keeps little more than one processor core busy.

    What does not fit is so known before the first step, however late its rows come.
    Raises RunError for a program that has no room on the device.
    """
    shapes = sorted(shapes)
    with ThreadPoolExecutor(max(1, len(shapes))) as threads:
        # Traced in this thread, which has the mesh in use; all are under way when the last one is traced.
        waiting = {shape: threads.submit(compile_within_memory, lower(shape)) for shape in shapes}
    device = jax.local_devices()[0]
    limit = limit_bytes(device)
    programs = {}
    for shape, future in waiting.items():
        try:
            programs[shape] = future.result()
        except NoRoomError as error:
            raise _no_room(shape, str(error)) from None
        analysis: Any = programs[shape].memory_analysis()
        needed = analysis.argument_size_in_bytes + temporaries(programs[shape], device.platform)
        if limit is not None and needed > limit:
            raise _no_room(shape, f"{needed / GIB:.1f} GiB are needed and {limit / GIB:.1f} GiB may be used")
    return programs


def _no_room(shape: Shape, reason: str) -> RunError:
    return RunError(
        f"{shape.rows} rows of {shape.length} tokens do not fit the device: {reason}. Lower data.max_row_length or "
        "data.block_size, raise training.gradient_accumulation_steps or mesh.tensor, set model.remat=full, or take "
        "more devices; --plan TARGET says what a run needs"
    )
