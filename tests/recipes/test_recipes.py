"""Each file of docs/recipes is run here, with stand-ins for the launchers that start two processes on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.processes import free_port
from tests.recipes import launchers
from tests.test_launchers import V5P, machine
from tests.tiny import model_directory
from tests.training.conftest import metrics

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "docs" / "recipes"
TRAIN = ["train.py", "configs/sft/s1-32b-h100-8x2.yaml"]
GENERATE = ["decode.py", "generate", "configs/decode/s1-32b.yaml", "prompt=x"]
EVALUATE = ["decode.py", "evaluate", "configs/eval/s1-32b.yaml"]


def run_recipe(name: str, words: list[str], tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe in a copy of the checkout's top whose .venv/bin/python is this text."""
    programs, checkout = tmp_path / "programs", tmp_path / "checkout"
    for directory in (programs, checkout / ".venv" / "bin"):
        directory.mkdir(parents=True)
    launchers.install(programs)
    for path in (checkout / ".venv/bin/python", programs / "python"):
        path.write_text(f"#!/bin/bash\n{python}\n")
        path.chmod(0o755)
    for entry in ("configs", "train.py", "decode.py", "s1jax", "tests"):
        (checkout / entry).symlink_to(ROOT / entry)
    on_tpu = "tpu" in name
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "XLA_FLAGS": "",
        "HOSTS": "localhost,localhost",
        "CLUSTER": "c",
        "IMAGE": "i",
        "TPU": "t",
        "S1JAX_PORT": str(free_port()),
        "S1JAX_CHECKOUT": str(checkout),
        "S1JAX_ROOT": str(machine(tmp_path / "machine", pci=V5P if on_tpu else ())),
    }
    recipe = RECIPES / name
    if "task-per-gpu" in name:
        environment["SLURM_NTASKS_PER_NODE"] = "8"
    command = [str(recipe), *(["s1"] if "xpk" in name else []), *words]
    return subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=400
    )


def test_every_recipe_is_tried() -> None:
    scripts = {path.name for path in RECIPES.iterdir()} - {"skypilot.yaml"}
    assert scripts == {"slurm.sh", "slurm-task-per-gpu.sh", "open-mpi.sh", "xpk-gpu.sh", "xpk-tpu.sh", "cloud-tpu.sh"}
    for name in scripts:
        assert subprocess.run(["bash", "-n", RECIPES / name], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("words", [TRAIN, GENERATE, EVALUATE], ids=["train", "generate", "evaluate"])
@pytest.mark.parametrize(
    "name", ["slurm.sh", "slurm-task-per-gpu.sh", "open-mpi.sh", "xpk-gpu.sh", "xpk-tpu.sh", "cloud-tpu.sh"]
)
def test_a_recipes_processes_find_each_other(name: str, words: list[str], tmp_path: Path) -> None:
    result = run_recipe(name, words, tmp_path, f'exec {sys.executable} -m tests.recipes.show_place "$@"')
    assert result.returncode == 0, result.stderr
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('["')]
    command = "train.py" if words is TRAIN else words[1]
    # With a copy of the model each, the processes of a decoding command are not jax's processes of one run.
    joined = [[command, 0, 2, 0, 2], [command, 1, 2, 1, 2]]
    apart = [[command, 0, 2, 0, 1], [command, 1, 2, 0, 1]]
    assert sorted(told) == (joined if words is TRAIN else apart)


@pytest.mark.slow
def test_training_started_by_the_slurm_recipe(tmp_path: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    rows = [{"question": f"{i} + 3?", "thinking_trajectories": [f"I add {i}. "], "attempt": str(i)} for i in range(8)]
    traces.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model.path={model_directory(tmp_path / 'model')}", f"data.path={traces}", "data.block_size=256"]
    words += [f"training.output_dir={tmp_path / 'run'}", "training.batch_size=4", "training.max_steps=2", "mesh.fsdp=2"]
    result = run_recipe("slurm.sh", ["train.py", *words], tmp_path, f'exec {sys.executable} "$@"')
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_the_skypilot_job(tmp_path: Path) -> None:
    job = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert set(job) <= {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program = tmp_path / ".venv/bin/python"
    program.write_text(f'#!/bin/bash\ncd {ROOT}\nexec {sys.executable} -m tests.recipes.show_place "$@"\n')
    program.chmod(0o755)
    port, root = free_port(), machine(tmp_path / "machine")
    processes = [
        subprocess.Popen(
            ["bash", "-c", job["run"]],
            cwd=tmp_path,
            env={
                **os.environ,
                "XLA_FLAGS": "",
                "S1JAX_ROOT": str(root),
                "COMMAND": " ".join(TRAIN),
                **launchers.skypilot(number, job["num_nodes"], port),
            },
            text=True,
            stdout=subprocess.PIPE,
        )
        for number in range(job["num_nodes"])
    ]
    told = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]
    assert [json.loads(line) for line in told] == [["train.py", 0, 2, 0, 2], ["train.py", 1, 2, 1, 2]]
