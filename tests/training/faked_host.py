"""train.py on a host whose /sys and /proc lie in another directory: python -m tests.training.faked_host ROOT WORDS."""

import os
import sys
from functools import partial
from pathlib import Path

import train
from s1jax.processes import start_processes
from s1jax.training import loop

root, *words = sys.argv[1:]
# The tests' own choice of a platform would rule out that this is a TPU.
environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
loop.start_processes = partial(start_processes, environment=environment, root=Path(root))  # type: ignore[assignment]
sys.exit(train.main(words))
