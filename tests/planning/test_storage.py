"""How long a run waits for what it writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1jax.planning.storage import plan_storage


def storage(**changes: object):
    settings = {
        "checkpoint_bytes": 393_000_000_000,
        "export_bytes": 65_500_000_000,
        "steps": 315,
        "step_seconds": 3.0,
        "every_steps": 100,
        "hosts": 2,
        "gigabytes_per_second": 1.0,
    }
    return plan_storage(**{**settings, **changes})  # type: ignore[arg-type]


def test_the_32b_run() -> None:
    plan = storage()
    # Three, none after the last step; each takes 196.5 s beside 300 s of steps; the last has 45 s of steps beside it.
    assert plan.num_checkpoints == 3
    assert plan.checkpoint_seconds == pytest.approx(196.5)
    assert plan.waited_seconds == pytest.approx(196.5 - 45)
    assert plan.export_seconds == pytest.approx(65.5)
    assert plan.seconds == pytest.approx(196.5 - 45 + 65.5)
    slow = storage(gigabytes_per_second=0.5)
    assert slow.waited_seconds == pytest.approx(2 * (393 - 300) + 393 - 45)
    none = storage(every_steps=None)
    assert (none.num_checkpoints, none.waited_seconds) == (0, 0)


@given(st.integers(1, 40), st.integers(1, 50), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_wait_is_that_of_a_simulation(steps: int, every: int, step_seconds: float, write_seconds: float) -> None:
    """Step by step: a checkpoint begins when the one before is written, and so does the export."""
    clock = written = 0.0
    count = 0
    for step in range(1, steps + 1):
        clock += step_seconds
        if step % every == 0 and step < steps:
            clock = max(clock, written)
            written = clock + write_seconds
            count += 1
    clock = max(clock, written)
    plan = storage(
        steps=steps,
        step_seconds=step_seconds,
        every_steps=every,
        checkpoint_bytes=round(write_seconds * 1e9),
        hosts=1,
        export_bytes=0,
    )
    assert plan.num_checkpoints == count
    assert steps * step_seconds + plan.waited_seconds == pytest.approx(clock, rel=1e-6)
