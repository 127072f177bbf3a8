"""The command: its help, its errors, a full disk."""

import subprocess
import sys
from pathlib import Path

import pytest

from s1jax.config_reader import load_config
from s1jax.curation.config import CurateConfig
from tests.curation.stages import write_rows
from tests.small_disk import small_disk


def curate(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "s1jax.curate", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_names_stages_and_keys() -> None:
    stages = curate("--help")
    assert stages.returncode == 0
    assert stages.stdout.index("collect") < stages.stdout.index("distill") < stages.stdout.index("format")
    keys = curate("select", "--help")
    assert keys.returncode == 0
    assert "sources.NAME.question" in keys.stdout
    assert "students.NAME.endpoint.base_url" in keys.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sources.m.pth=a"], "sources.m.pth: unknown key; did you mean sources.m.path?"),
        (["sources.m.path=a", "students.x.endpoint.modl=a"], "did you mean students.x.endpoint.model?"),
        (["sources.m.path=a", "students.judge.path=a"], "is not teacher, judge or domains"),
        (["sources.m.path=a", "sources.m.limit=a"], "sources.m.limit: Input should be a valid integer, "),
    ],
)
def test_mistakes_in_keys_are_named(tmp_path: Path, words: list[str], message: str) -> None:
    done = curate("collect", f"output_dir={tmp_path / 'run'}", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", sorted((Path(__file__).parents[2] / "configs/curation").glob("*.yaml")), ids=str)
def test_presets_have_known_keys(preset: Path) -> None:
    config = load_config(CurateConfig, [str(preset)])
    assert len(config.students) == 2
    assert set(config.select.preselect) | set(config.filter.asy_sources) <= set(config.sources)


def test_a_word_that_is_no_stage() -> None:
    done = curate("colect", "a.yaml")
    assert done.returncode == 2
    assert "collect" in done.stdout


def test_a_full_disk_leaves_earlier_work_as_it_was(tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", [{"question": "Is it 1?"}])
    many = write_rows(tmp_path / "many.jsonl", [{"question": f"Is it {i}?"} for i in range(20_000)])
    with small_disk(tmp_path / "disk", "1m") as disk:
        run = disk / "run"
        assert curate("collect", f"output_dir={run}", f"sources.s.path={few}").returncode == 0
        before = {file.name: file.read_bytes() for file in run.iterdir()}
        full = curate("collect", f"output_dir={run}", f"sources.s.path={many}")
        assert full.returncode == 1
        what = "No space left on device; it is as it was before"
        assert full.stderr == f"error: {run / 'questions.jsonl'}: {what}\n"
        assert {file.name: file.read_bytes() for file in run.iterdir()} == before
