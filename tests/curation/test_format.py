import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from s1jax.data.examples import load_examples
from s1jax.data.sources import read_source
from tests.curation.stages import card, filtered, read_rows, run_stage, write_rows


def write_selected(run: Path, count: int) -> None:
    metadata = [{"level": 1}, {"year": "1999", "tags": ["a"]}]
    rows = [
        filtered(f"What is {i} + 1?", i + 1, answer=str(i + 1), metadata=metadata[i % 2], domain=f"d{i}")
        for i in range(count)
    ]
    write_rows(run / "selected.jsonl", rows)


@pytest.mark.parametrize("type_", ["jsonl", "parquet"])
def test_the_projects_own_reading_of_s1k_takes_the_rows(tmp_path: Path, tokenizer_directory: Path, type_: str) -> None:
    run = tmp_path / "run"
    write_selected(run, 10)
    assert run_stage("format", run, {"format": {"type": type_, "validation": 3}}) == 0
    assert {file.suffix for file in run.glob("[tv][ra]*")} == {f".{type_}"}
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    sizes = []
    for name in ("train", "validation"):
        dataset = load_examples(str(run / f"{name}.{type_}"), tokenizer, block_size=512, overlong="error")
        assert dataset.format == "s1K"
        sizes.append(len(dataset.examples))
        (row, *_) = read_source(str(run / f"{name}.{type_}")).rows
        text = tokenizer.decode(dataset.examples[0].input_ids)
        assert row[1]["question"] in text
        assert f"<|im_start|>think\n{row[1]['thinking_trajectories'][0].strip()}\n<|im_start|>answer" in text
        assert "Answer: It is 1." in text
    assert sizes == [7, 3]
    assert card(run)["format"]["tables"]["rows"] == {"validation": 3, "train": 7}


def test_rows_have_all_that_is_known(tmp_path: Path) -> None:
    write_selected(tmp_path / "run", 1)
    assert run_stage("format", tmp_path / "run") == 0
    (row,) = read_rows(tmp_path / "run" / "train.jsonl")
    assert json.loads(row.pop("metadata")) == {"level": 1}
    assert row == {
        "id": "What is 0 + 1?",
        "question": "What is 0 + 1?",
        "solution": "1",
        "source_type": "s",
        "domain": "d0",
        "thinking_trajectories": ["a "],
        "attempt": "It is 1.",
    }


def test_the_split_is_by_seed_and_complete(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_selected(run, 20)

    def split(seed: int) -> tuple[list[str], list[str]]:
        assert run_stage("format", run, {"format": {"validation": 5, "seed": seed}}) == 0
        train, validation = (
            [row["question"] for row in read_rows(run / f"{name}.jsonl")] for name in ("train", "validation")
        )
        return train, validation

    first = split(0)
    assert sorted(first[0] + first[1]) == sorted(row["question"] for row in read_rows(run / "selected.jsonl"))
    assert len(first[1]) == 5
    assert split(0) == first
    assert split(1) != first


def test_no_file_of_an_earlier_split_is_left_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_selected(run, 4)
    assert run_stage("format", run, {"format": {"validation": 1}}) == 0
    assert run_stage("format", run, {"format": {"type": "parquet"}}) == 0
    assert {file.name for file in run.glob("*.parquet")} == {"train.parquet"}
    assert not (run / "train.jsonl").exists()
    assert not (run / "validation.jsonl").exists()


@pytest.mark.parametrize(
    ("count", "section", "message"),
    [
        (3, {"validation": 3}, "3 questions are selected, and format.validation asks for 3 of them"),
        (None, {}, "run the stage select first"),
    ],
)
def test_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int | None, section: dict[str, Any], message: str
) -> None:
    if count is not None:
        write_selected(tmp_path / "run", count)
    assert run_stage("format", tmp_path / "run", {"format": section}) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "train.jsonl").exists()
