"""What this process is said to have held."""

import psutil

from s1jax.device_memory import peak_resident_bytes


def test_the_peak_is_in_bytes_whatever_the_system_counts_in() -> None:
    held = psutil.Process().memory_info().rss
    assert 0.9 * held < peak_resident_bytes() < psutil.virtual_memory().total
