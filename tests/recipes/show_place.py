"""A short program for recipes: joins the others as every command does, and prints what it was told.

Its words are those of a real command, which are read as that command reads them. S1JAX_ROOT is where /sys lies.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax

from s1jax.config import EvaluateConfig, GenerateConfig
from s1jax.config_reader import load_config
from s1jax.processes import start_processes
from s1jax.training.config import TrainConfig

command, *words = sys.argv[1:]
roots: dict[str, Any] = {"train.py": TrainConfig, "generate": GenerateConfig, "evaluate": EvaluateConfig}
if command == "decode.py":
    command, *words = words
config = load_config(roots[command], words)
environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
own = start_processes(config.mesh, environment, Path(os.environ["S1JAX_ROOT"]))
# One write, so that the lines of two processes do not mix.
os.write(1, (json.dumps([command, own.index, own.count, jax.process_index(), jax.process_count()]) + "\n").encode())
