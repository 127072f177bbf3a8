"""Programs are compiled before the first step, and what has no room on a device is known then."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from s1jax.data.packing import Shape
from s1jax.training import programs
from s1jax.training.run_directory import RunError
from tests.training.conftest import Command, start

SHAPES = [Shape(2, 256), Shape(2, 128)]


def lower(shape: Shape) -> jax.stages.Lowered:
    return jax.jit(lambda x: x * 2).lower(jnp.zeros(shape))


@pytest.mark.slow
def test_nothing_is_compiled_between_the_steps(command: Command, traces: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    rows[7]["question"] *= 8
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.path={mixed}", f"data.eval_path={mixed}", "training.eval_every=3", "training.batch_size=1"]
    process = start(command(tmp_path / "run", *words), variables={"JAX_LOG_COMPILES": "1"})
    text, _ = process.communicate(timeout=500)
    assert process.returncode == 0, text
    shapes = re.findall(r"one compilation each: (.*)", text)[0].split(", ")
    before, after = text.split("compiled in ")
    assert before.count("Compiling jit(train_step)") == len(shapes) > 1
    assert before.count("Compiling jit(evaluate)") == len(shapes)
    assert not re.findall(r"Compiling jit\((?:train_step|evaluate)\)", after)


def test_each_shape_has_a_program() -> None:
    compiled = programs.compile_all(lower, SHAPES)
    assert compiled.keys() == set(SHAPES)
    for shape, program in compiled.items():
        assert program(jnp.ones(shape)).sum() == 2 * shape.rows * shape.length


def test_rows_without_room_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 x 128 float32 in and out are 2 KiB, and 2 x 256 are 4 KiB.
    monkeypatch.setattr(programs, "limit_bytes", lambda device: 3 * 2**10)
    assert programs.compile_all(lower, SHAPES[1:])
    with pytest.raises(RunError, match=r"^2 rows of 256 tokens do not fit the device: 0\.0 GiB are needed"):
        programs.compile_all(lower, SHAPES)
