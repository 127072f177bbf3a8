"""Progress of a long command, where there is no terminal."""

import re
import time

import pytest

from s1jax.decoding import hosts
from s1jax.decoding.hosts import Hosts
from s1jax.processes import Processes


@pytest.mark.parametrize("index", [0, 1])
def test_a_log_has_a_line_now_and_then_of_the_process_that_writes(
    index: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hosts, "LINE_SECONDS", 0.2)
    with Hosts(Processes(index, 2)).progress(4, "answer") as bar:
        for decoded in range(4):
            time.sleep(0.3)
            bar.set_postfix_str(f"decoded {decoded} tokens", refresh=False)
            bar.update()
    lines = capsys.readouterr().err.replace("\r", "").split("\n")
    expected = (
        [rf"{25 * n}%, {n} of 4 \[.*answer.*, decoded {n - 1} tokens\]" for n in (1, 2, 3, 4)] if not index else []
    )
    for pattern in expected:
        assert any(re.fullmatch(pattern, line) for line in lines), (pattern, lines)
    assert bool("".join(lines)) == bool(expected)


def test_what_is_done_soon_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Hosts(Processes()).progress(1, "row") as bar:
        bar.update()
    assert capsys.readouterr().err == ""
