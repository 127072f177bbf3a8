import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.curation.stages import card, read_rows, run_stage, write_rows

LONG = "How many apples does Anna have if she had four and gave one away?"


def test_sources_are_read_by_their_columns_from_jsonl_and_parquet(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "a.jsonl",
        [{"problem": "1 + 1?", "solution": "We add.\n#### 2", "level": 3, "field": "sums"}, {"problem": "2 + 2?"}],
    )
    columns = {"q": ["3 + 3?", "not read"], "a": [6, 7]}
    parquet.write_table(pa.table(columns), tmp_path / "b.parquet")
    sources = {
        "first": {
            "path": str(tmp_path / "a.jsonl"),
            "question": "problem",
            "answer": "solution",
            "domain": "field",
            "metadata": ["level"],
        },
        "second": {"path": str(tmp_path / "b.parquet"), "question": "q", "answer": "a", "limit": 1},
    }
    assert run_stage("collect", tmp_path / "run", {"sources": sources}) == 0
    first, second, third = read_rows(tmp_path / "run" / "questions.jsonl")
    assert first["answer"] == "We add.\n#### 2"
    assert (first["source"], first["domain"], first["metadata"]) == ("first", "sums", {"level": 3})
    assert (second["answer"], second["domain"], second["metadata"]) == (None, None, {"level": None})
    assert (third["question"], third["answer"], third["source"]) == ("3 + 3?", "6", "second")
    ids = {row["id"] for row in (first, second, third)}
    assert len(ids) == 3

    sources["first"] |= {"answer_after": "####", "limit": 1}
    assert run_stage("collect", tmp_path / "run", {"sources": sources}) == 0
    again = read_rows(tmp_path / "run" / "questions.jsonl")
    assert [row["answer"] for row in again] == ["2", "6"]
    assert again[0]["id"] == first["id"]


def test_a_data_set_through_datasets(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    for split in ("train", "test"):
        write_rows(directory / f"{split}.jsonl", [{"question": f"A question of {split}?"}])
    config = {"sources": {"s": {"path": str(directory), "split": "test"}}}
    assert run_stage("collect", tmp_path / "run", config) == 0
    assert [row["question"] for row in read_rows(tmp_path / "run" / "questions.jsonl")] == ["A question of test?"]


def test_duplicates_empties_and_overlaps_are_dropped_and_counted(tmp_path: Path) -> None:
    one = write_rows(
        tmp_path / "one.jsonl",
        [{"question": text} for text in ("Is it 1?", "Is it 1?", "is  it\n1?", " ", None, f"Well, {LONG} Say.")],
    )
    two = write_rows(tmp_path / "two.jsonl", [{"question": "IS IT 1?"}, {"question": "Is it -1?"}])
    test = write_rows(tmp_path / "test.jsonl", [{"question": "Unrelated."}, {"question": LONG.upper()}])
    config = {
        "sources": {"one": {"path": str(one)}, "two": {"path": str(two)}},
        "evaluation_sets": {"test": {"path": str(test)}},
    }
    assert run_stage("collect", tmp_path / "run", config) == 0
    assert [row["question"] for row in read_rows(tmp_path / "run" / "questions.jsonl")] == ["Is it 1?", "Is it -1?"]
    (dropped,) = read_rows(tmp_path / "run" / "contaminated.jsonl")
    assert dropped["question"] == f"Well, {LONG} Say."
    assert dropped["matches"] == [
        {
            "evaluation_set": "test",
            "number": 2,
            "question": LONG.upper(),
            "words": "how many apples does anna have if she",
        }
    ]
    entry = card(tmp_path / "run")["collect"]
    assert [count for _, count in entry["funnel"]] == [8, 3, 2]
    assert entry["tables"]["dropped"] == {
        "exact duplicates": 1,
        "duplicates but for case and white space": 2,
        "empty": 2,
    }
    assert entry["tables"]["dropped as contaminated by"] == {"test": 1}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"question": "problem"}, r"sources\.s\.question: .*a\.jsonl has no column 'problem'; it has 'question', 'n'"),
        ({"metadata": ["m"]}, r"sources\.s\.metadata: .* no column 'm'"),
        ({"question": "n"}, r"line 2: n: expected a text, found list \[1\]"),
        ({"answer": "question", "answer_after": "####"}, r"line 1: question: there is no '####' in it"),
    ],
)
def test_a_source_that_does_not_fit_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: dict[str, object], message: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"question": "Is it 1?", "n": 1}, {"question": "Is it 2?", "n": [1]}])
    assert run_stage("collect", tmp_path / "run", {"sources": {"s": {"path": str(path)}}}) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert run_stage("collect", tmp_path / "run", {"sources": {"s": {"path": str(path), **section}}}) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_nothing_left_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"question": LONG}])
    config = {"sources": {"s": {"path": str(path)}}, "evaluation_sets": {"e": {"path": str(path)}}}
    assert run_stage("collect", tmp_path / "run", config) == 1
    assert "none of 1 questions is left" in capsys.readouterr().err
    assert not (tmp_path / "run" / "questions.jsonl").exists()
