"""Stand-ins for srun, mpirun, xpk, gcloud and sky: each starts its command here, as often as the real one would on
its hosts, with the variables that the real one sets.

`install` writes them into a directory for PATH. Every process also finds S1JAX_PORT, a free port of loopback.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.test_processes import gke_tpu, open_mpi, slurm, xpk

ROOT = Path(__file__).parents[2]


def install(directory: Path) -> None:
    """Write an executable for each launcher into the directory."""
    for name in ("srun", "mpirun", "xpk", "gcloud"):
        path = directory / name
        path.write_text(f'#!/bin/bash\ncd {ROOT}\nexec {sys.executable} -m tests.recipes.launchers {name} "$@"\n')
        path.chmod(0o755)


def skypilot(number: int, count: int, port: int) -> dict[str, str]:
    return {
        "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * count),
        "SKYPILOT_NUM_NODES": str(count),
        "SKYPILOT_NODE_RANK": str(number),
        "JAX_COORDINATOR_PORT": str(port),
    }


def slurm_task_per_gpu(number: int, count: int, port: int) -> dict[str, str]:
    one_node = {"SLURM_STEP_TASKS_PER_NODE": str(count), "SLURM_NODEID": "0", "SLURM_LOCALID": str(number)}
    return {**slurm(number, count, port), **one_node}


def start_all(variables: Callable[[int, int, int], dict[str, str]], command: list[str]) -> int:
    """Run the command twice at once; the first status that is not 0."""
    port = int(os.environ["S1JAX_PORT"])
    processes = [
        subprocess.Popen(command, env={**os.environ, **variables(number, 2, port)}, cwd=os.environ["S1JAX_CHECKOUT"])
        for number in range(2)
    ]
    return next((status for status in [process.wait(timeout=300) for process in processes] if status), 0)


def _after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def main(launcher: str, words: list[str]) -> int:
    if launcher == "srun":
        variables = slurm_task_per_gpu if os.environ.get("SLURM_NTASKS_PER_NODE") == "8" else slurm
        return start_all(variables, [word for word in words if not word.startswith("--")])
    if launcher == "mpirun":
        assert _after(words, "--host").split(",")[0] == "localhost"
        command = words[words.index(".venv/bin/python") :]
        # The recipe's port may be taken on a machine that runs tests.
        command = [word.replace(":8476", f":{os.environ['S1JAX_PORT']}") for word in command]

        def version_5(number: int, count: int, port: int) -> dict[str, str]:
            told = open_mpi(number, count, port)
            return {name: value for name, value in told.items() if "uri" not in name}

        return start_all(version_5, command)
    command = ["bash", "-c", _after(words, "--command").replace("cd s1jax && ", "")]
    on_tpu = launcher == "gcloud" or "--tpu-type" in words
    return start_all(gke_tpu if on_tpu else xpk, command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
