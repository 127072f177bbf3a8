"""What `make` would do with the Pythons of other machines, which a stand-in names."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(directory: Path, python: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The commands of a target for an interpreter of this version, none of them run."""
    stand_in = directory / f"python{python}"
    stand_in.write_text(f"#!/bin/sh\necho {python}\n")
    stand_in.chmod(0o755)
    # `make test` leaves its own flags to the tests.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    command = ["make", "-n", *words, f"PYTHON={stand_in}", f"VENV={directory}/venv"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_a_python_with_a_lock_gets_its_versions(tmp_path: Path, python: str) -> None:
    made = make(tmp_path, python, "install", "compilers")
    assert made.returncode == 0, made.stderr
    assert f"{tmp_path}/python{python} -m venv {tmp_path}/venv" in made.stdout
    assert f"--constraint requirements/py{python}.txt" in made.stdout
    assert f"--requirement requirements/compilers-py{python}.txt" in made.stdout
    assert "echo" not in made.stdout


@pytest.mark.parametrize("python", ["3.14", "3.15"])
def test_a_python_without_a_lock_says_so_and_gets_what_the_project_allows(tmp_path: Path, python: str) -> None:
    made = make(tmp_path, python, "install", "compilers")
    assert made.returncode == 0, made.stderr
    said = [line for line in made.stdout.splitlines() if line.startswith("echo")]
    assert [f"Python {python}" in line for line in said] == [True, True]
    assert "no lock" in said[0]
    assert "no list of compilers" in said[1]
    assert "--constraint" not in made.stdout
    assert "-m pip install --quiet  --editable '.[dev]'" in made.stdout
    assert f"--requirement {tmp_path}/venv/compilers.txt" in made.stdout


@pytest.mark.parametrize("python", ["2.7", "3.9", "3.10"])
def test_an_old_python_is_refused_in_one_line(tmp_path: Path, python: str) -> None:
    made = make(tmp_path, python, "install")
    assert made.returncode == 2
    assert "is not Python 3.11 or newer" in made.stderr.strip()
    assert len(made.stderr.splitlines()) == 1


def test_an_environment_of_another_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    made = make(tmp_path, "3.99", "lint")
    assert made.returncode == 2
    assert f"{tmp_path}/venv was made with another Python than 3.99" in made.stderr


def test_the_compilers_without_a_list_are_those_of_the_installed_jax() -> None:
    command = [sys.executable, "requirements/compilers.py"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    jax = version("jax")
    exactly = f"<={jax},>={jax}"
    assert sorted(lines)[:2] == [f"jax-cuda12-pjrt{exactly}", f"jax-cuda12-plugin{exactly}"]
    assert [line.startswith("libtpu==") for line in sorted(lines)[2:]] == [True]
