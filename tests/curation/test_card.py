import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.image import imread

from s1jax.curation.card import Entry, add_to_card
from tests.curation.stages import card, question, read_rows, run_stage, trace, write_rows


def run_all(run: Path, size: int = 4) -> None:
    write_rows(run.parent / "a.jsonl", [{"question": f"What is {i} + 1?"} for i in range(9)] + [{"question": ""}])
    config = {
        "sources": {"sums | more": {"path": str(run.parent / "a.jsonl")}},
        "select": {"size": size},
        "format": {"validation": 1},
    }
    assert run_stage("collect", run, config) == 0
    ids = [row["id"] for row in read_rows(run / "questions.jsonl")]
    failed = {"status": "failed", "reason": "it is 500", "trace": None, "answer": None}
    write_rows(run / "traces.jsonl", [trace(i, **(failed if i == ids[0] else {})) for i in ids])
    for stage in ("filter", "select", "format"):
        assert run_stage(stage, run, config) == 0


def test_the_funnel_stands_in_a_table_and_a_picture(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_all(run)
    text = (run / "card.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith(("| collect |", "| filter |", "| select |"))]
    assert table == [
        "| collect | in the sources | 10 |  |",
        "| collect | with a question, each once | 9 | 1 |",
        "| collect | not in an evaluation set | 9 | 0 |",
        "| filter | with a trace | 8 | 1 |",
        "| filter | of usable form | 8 | 0 |",
        "| filter | not solved by a student | 8 | 0 |",
        "| select | selected | 4 | 4 |",
    ]
    assert "| failed in distill | 1 |" in text
    assert "| sums \\| more | 10 |" in text
    assert "| train | 3 |" in text
    assert '"size": 4' in text
    assert "](card.svg)" in text
    words = " ".join(ElementTree.parse(run / "card.svg").getroot().itertext()).split()
    assert "10" in words
    assert "selected" in words
    assert imread(run / "card.png").size


def test_a_stage_run_again_takes_the_later_ones_off(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_all(run)
    assert list(card(run)) == ["collect", "filter", "select", "format"]
    assert run_stage("filter", run) == 0
    assert list(card(run)) == ["collect", "filter"]
    assert "| select |" not in (run / "card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"collect": {"funnel": [["all", 1' + 400 * "0" + "]]}}",
        '{"collect": {"funnel": [["all", -1]]}}',
        '{"collect": {"funnel": [["all", true]]}}',
        '{"collect": {"tables": {"more": {"a": NaN}}}}',
    ],
)
def test_a_card_that_is_none_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_rows(run / "questions.jsonl", [question("a")])
    write_rows(run / "traces.jsonl", [trace("a")])
    (run / "card.json").write_text(text)
    assert run_stage("filter", run) == 1
    assert f"{run / 'card.json'}: " in capsys.readouterr().err


def test_a_label_is_drawn_as_it_is_written(tmp_path: Path) -> None:
    label = r"$\no mathematics$"
    add_to_card(tmp_path, "collect", Entry(funnel=[(label, 1)]), {})
    assert label in " ".join(ElementTree.parse(tmp_path / "card.svg").getroot().itertext())
