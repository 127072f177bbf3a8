"""What a training run writes, and how long it waits for that."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """Checkpoints and the model at the end; bytes are of all hosts together."""

    checkpoint_bytes: int
    num_checkpoints: int
    export_bytes: int
    checkpoint_seconds: float
    """Of writing one."""
    export_seconds: float
    waited_seconds: float
    """For checkpoints that are not yet written when the next one begins, or the export."""

    @property
    def seconds(self) -> float:
        """What the run takes longer for all of this."""
        return self.waited_seconds + self.export_seconds


def plan_storage(
    *,
    checkpoint_bytes: int,
    export_bytes: int,
    steps: int,
    step_seconds: float,
    every_steps: int | None,
    hosts: int,
    gigabytes_per_second: float,
) -> Storage:
    """Storage of a run whose hosts each write so many 10^9 bytes a second.

    A checkpoint is written by all hosts while the run goes on; the next one, and the export, which the first host
    writes, begin when it is written. After the last step there is none. Copying the state off the devices is not
    counted.
    """
    rate = gigabytes_per_second * 1e9
    one = checkpoint_bytes / (rate * hosts)
    count = (steps - 1) // every_steps if every_steps else 0
    between = (every_steps or 0) * step_seconds
    waited = 0.0
    if count:
        after_last = (steps - count * every_steps) * step_seconds if every_steps else 0.0
        waited = (count - 1) * max(0.0, one - between) + max(0.0, one - after_last)
    return Storage(checkpoint_bytes, count, export_bytes, one, export_bytes / rate, waited)
