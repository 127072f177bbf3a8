"""`make demo` from its first step to its page, with a fraction of its training and questions."""

import json
from pathlib import Path

import pytest
from selenium import webdriver

from s1jax.demo import __main__ as demo
from tests.pages import browser, check_numbers

__all__ = ["browser"]


@pytest.mark.slow
def test_the_demo_trains_evaluates_and_shows_what_it_measured(
    browser: webdriver.Chrome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "NUM_TRAIN", 160)
    monkeypatch.setattr(demo, "NUM_TEST", 12)
    monkeypatch.setenv("XLA_FLAGS", "")
    demo.main(tmp_path, seed=3)
    evaluation = tmp_path / "evaluation"
    check_numbers(browser, evaluation, "test")
    summary = json.loads((evaluation / "summary.json").read_text())["tasks"]["test"]
    printed = capfd.readouterr().out
    assert demo.table(summary) in printed
    assert "This is a miniature" in printed
    assert f"open {evaluation}/report.html" in printed
    assert len(summary["methods"]["budget"]["runs"]) == 8
    assert len(summary["methods"]["wait"]["runs"]) == 4
    assert summary["methods"]["budget"]["control"] == 1
