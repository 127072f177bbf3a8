"""Progress of a long command, where there is no terminal."""

import re
import time

import pytest

from s1jax import progress as module
from s1jax.progress import progress


@pytest.mark.parametrize(("total", "of_all"), [(4, r" of 4 \[00:0.<00:0."), (None, r" \[00:0.")])
def test_a_log_has_a_line_now_and_then(
    total: int | None, of_all: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.2)
    with progress("answer", total, name="attempt") as bar:
        for decoded in range(4):
            time.sleep(0.3)
            bar.set_postfix_str(f"decoded {decoded} tokens", refresh=False)
            bar.update()
    lines = capsys.readouterr().err.replace("\r", "").split("\n")
    for number in (1, 2, 3, 4):
        pattern = rf"attempt: {number}{of_all}, .*answer.*, decoded {number - 1} tokens\]"
        assert any(re.fullmatch(pattern, line) for line in lines), (pattern, lines)


def test_a_log_has_a_line_while_nothing_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.2)
    with progress("answer", 8) as bar:
        for finished in (0, 3, 0, 0):
            time.sleep(0.3)
            bar.update(finished)
    lines = re.findall(r"\d+ of 8(?= \[)", capsys.readouterr().err)
    assert lines[:4] == ["0 of 8", "3 of 8", "3 of 8", "3 of 8"]


def test_what_another_process_shows_or_is_done_soon_has_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("row", 1) as bar:
        bar.update()
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    with progress("row", 1, shown=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
