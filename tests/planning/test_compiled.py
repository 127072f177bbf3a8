"""What plans keep on disk of compiled programs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.planning.conftest import plan
from tests.tiny import QWEN2


@pytest.mark.slow
def test_a_program_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made again is the same; what is damaged, of another kind or cannot be kept is compiled."""
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, "head_dim": 128}))
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def planned(*words: str) -> dict[str, Any]:
        command = ("decode.py", "generate", f"model.path={tmp_path}", "prompt=x", "model.dtype=bfloat16")
        return plan(tmp_path / "plan.json", *command, "max_total_tokens=128", *words, "--plan", "h100:1x1")

    def kept() -> dict[str, int]:
        return {file.name: file.stat().st_ino for file in (cache / "s1jax" / "planned").iterdir()}

    first, before = planned(), kept()
    assert len(before) == 1
    # A file that is written anew is another one.
    assert (planned(), kept()) == (first, before)
    faster = planned("plan.efficiency=0.9")
    assert faster["estimate"]["compute"] == pytest.approx(first["estimate"]["compute"] / 2)
    assert kept() == before

    (file,) = (cache / "s1jax" / "planned").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert planned() == first
    assert kept().keys() == before.keys()
    assert kept() != before

    planned("batch_size=4")
    assert len(kept()) == 2
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--a_setting=1")
    assert planned() == first
    assert len(kept()) == 3

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert planned() == first
