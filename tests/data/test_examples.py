import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import processors

from s1jax.data.examples import load_examples
from s1jax.jsonl import InputError
from tests import tiny
from tests.reference import chat as reference

S1K = {"question": "What is 3 + 4?", "thinking_trajectories": ["3 and 4.", "Wait, 7."], "attempt": "7"}
S1K_TEXT = reference.s1_text("What is 3 + 4?", "3 and 4.\nWait, 7.", "7")
S1K_11 = {
    "question": "What is 12 * 5?",
    "deepseek_thinking_trajectory": "60, no?",
    "deepseek_attempt": "Answer: 60",
    "gemini_thinking_trajectory": "Gemini's trace",
    "gemini_attempt": "Gemini's answer",
    "thinking_trajectories": ["an older trace"],
    "attempt": "an older answer",
}
S1K_11_TEXT = reference.s1_text("What is 12 * 5?", "60, no?", "Answer: 60")
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "3 + 4?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "12"},
]
FORMATS = {
    "s1K": (S1K, S1K_TEXT),
    "s1K-1.1": (S1K_11, S1K_11_TEXT),
    "messages": ({"messages": CONVERSATION}, reference.conversation_text(CONVERSATION)),
    "text": (
        {"text": "<|im_start|>assistant\n7", "messages": CONVERSATION, **S1K_11},
        "<|im_start|>assistant\n7",
    ),
}


def write(path: Path, rows: list) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def load(path, tokenizer, block_size=1000, overlong="error"):
    return load_examples(path, tokenizer, block_size=block_size, overlong=overlong)


def error_of(rows, tokenizer, tmp_path, name="train.jsonl", **kwargs) -> str:
    """The report on these rows, less its first line, which is checked here."""
    path = write(tmp_path / name, rows)
    with pytest.raises(InputError) as error:
        load(path, tokenizer, **kwargs)
    first, *problems = str(error.value).split("\n")
    unit = "lines" if name.endswith("jsonl") else "rows"
    assert re.fullmatch(rf"{re.escape(path)}: \d+ problems? \({unit} count from 1\)", first)
    return "\n".join(problems)


# Reading


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_from_every_kind_of_file(name, suffix, tokenizer, tmp_path):
    row, text = FORMATS[name]
    data = load(write(tmp_path / f"train{suffix}", [row, row]), tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    mask = reference.loss_mask(
        ids,
        tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False),
        tokenizer.encode("<|im_start|>user", add_special_tokens=False),
    )
    assert data.format == name
    assert (data.rows, data.truncated, data.dropped, len(data.examples)) == (2, 0, 0, 2)
    for example in data.examples:
        assert (example.input_ids.dtype, example.loss_mask.dtype) == (np.int32, bool)
        assert example.input_ids.tolist() == ids
        assert example.loss_mask.tolist() == mask


def test_a_hub_data_set_is_read_through_datasets(tokenizer, tmp_path, monkeypatch):
    # `datasets` takes a folder by the same name before it asks the hub.
    folder = tmp_path / "someone" / "s1K"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", [S1K, {**S1K, "attempt": ""}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(InputError, match=r"^someone/s1K: 1 problem \(rows count from 1\)\n  row 2: field 'attempt'"):
        load("someone/s1K", tokenizer)

    write(folder / "train.jsonl", [S1K, S1K_11 | S1K])
    data = load("someone/s1K", tokenizer)
    assert (data.format, data.rows) == ("s1K", 2)
    assert tokenizer.decode(data.examples[0].input_ids) == S1K_TEXT


def test_what_datasets_cannot_load_is_an_error_with_its_reason(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no file of that name, and `datasets` cannot load it .*: .*empty"):
        load(str(tmp_path / "empty"), tokenizer)


def test_nothing_is_added_to_the_text(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path)
    tokens = ["<|endoftext|>", "<|fim_pad|>"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|fim_pad|>",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens],
    )
    rows = [{"text": S1K_TEXT}, {"text": "x" + S1K_TEXT}]
    data = load(write(tmp_path / "train.jsonl", rows), tokenizer)
    assert [tokenizer.decode(example.input_ids) for example in data.examples] == [S1K_TEXT, "x" + S1K_TEXT]


def test_line_numbers_count_blank_lines_and_a_byte_order_mark_is_no_matter(tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\ufeff" + json.dumps(S1K) + "\r\n\n  \n" + json.dumps(S1K) + "\n\n")
    assert load(str(path), tokenizer).rows == 2
    path.write_text(path.read_text() + "3\n")
    with pytest.raises(InputError, match=r"1 problem .*\n  line 6: expected an object with named fields, found int 3"):
        load(str(path), tokenizer)


# What cannot be read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "a,b", "cannot read a '.csv' file, expected one of .jsonl, .json, .parquet"),
        ("train.jsonl", "", "there are no rows in it"),
        ("train.jsonl", "\n \n", "there are no rows in it"),
        ("train.json", "[]", "there are no rows in it"),
        ("train.json", '{"text": "a"}', "expected a list of objects .*, found dict {'text': 'a'}"),
        (
            "train.json",
            '{"a": 1}\n{"a": 2}',
            r"not JSON: Extra data at line 2, character 1; .*one object per line .* \.jsonl file",
        ),
        ("train.json", "[1,", "not JSON: .*; expected a list of objects"),
        ("train.parquet", "no parquet", "not readable as Parquet: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tokenizer, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}"):
        load(str(path), tokenizer)


@pytest.mark.parametrize("path", ["no/such/file.jsonl", "data/missing.jsonl", "./missing", "missing"])
def test_a_path_that_is_neither_file_nor_hub_id(path, tokenizer):
    with pytest.raises(InputError, match=rf"^{path}: no such file, and not the id of a hub data set \(owner/name\)$"):
        load(path, tokenizer)


def test_lines_that_are_not_json_objects(tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [
        json.dumps(S1K).encode(),
        b'{"question": ',
        b"[1, 2]",
        b'"text"',
        b'{"question": "\xff"}',
        b"null",
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError) as error:
        load(str(path), tokenizer)
    assert str(error.value).split("\n") == [
        f"{path}: 5 problems (lines count from 1)",
        "  line 2: not JSON: Expecting value at character 14",
        "  line 3: expected an object with named fields, found list [1, 2]",
        "  line 4: expected an object with named fields, found str 'text'",
        "  line 5: not UTF-8: invalid start byte at byte 15",
        "  line 6: expected an object with named fields, found null",
    ]


# Rows that cannot be used


def test_no_known_format(tokenizer, tmp_path):
    assert error_of([{"prompt": "3 + 4?", "response": "7"}], tokenizer, tmp_path) == (
        "  line 1: no known format: expected a column 'text' (text), 'messages' (messages), "
        "'deepseek_thinking_trajectory' (s1K-1.1), 'thinking_trajectories' (s1K); found 'prompt', 'response'"
    )


def test_no_known_format_is_reported_with_the_unreadable_rows(tokenizer, tmp_path):
    assert error_of([3, {}], tokenizer, tmp_path) == (
        "  line 1: expected an object with named fields, found int 3\n"
        "  line 2: no known format: expected a column 'text' (text), 'messages' (messages), "
        "'deepseek_thinking_trajectory' (s1K-1.1), 'thinking_trajectories' (s1K); found none"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "thinking_trajectories": ["t"]}, "field 'attempt' is missing"),
        (S1K | {"question": ""}, "field 'question' should not be empty, found str ''"),
        (S1K | {"attempt": " \n"}, r"field 'attempt' should not be empty, found str ' \n'"),
        (S1K | {"attempt": None}, "field 'attempt' should be a valid string, found null"),
        (S1K | {"attempt": 7}, "field 'attempt' should be a valid string, found int 7"),
        (
            S1K | {"thinking_trajectories": "t"},
            "field 'thinking_trajectories' should be a valid list, found str 't'",
        ),
        (
            S1K | {"thinking_trajectories": []},
            "field 'thinking_trajectories' should not be empty, found list []",
        ),
        (
            S1K | {"thinking_trajectories": ["t", 3]},
            "field 'thinking_trajectories[1]' should be a valid string, found int 3",
        ),
        (
            S1K | {"attempt": "half \ud83d of a pair"},
            r"attempt: not valid Unicode: a lone surrogate, \ud83d, at character 6",
        ),
        ({k: v for k, v in S1K_11.items() if k != "deepseek_attempt"}, "field 'deepseek_attempt' is missing"),
        ({"text": 3}, "field 'text' should be a valid string, found int 3"),
        (
            {"text": "What is 3 + 4?"},
            r"nothing to train on: there is no '<|im_start|>assistant\n' in the text",
        ),
        (
            {"text": "<|im_start|>assistant\n"},
            "nothing to train on: no text follows the start of the assistant turn",
        ),
        ({"messages": CONVERSATION[:2]}, "there is no assistant turn among the messages"),
        ({"messages": []}, "there is no assistant turn among the messages"),
        (
            {"messages": [*CONVERSATION, CONVERSATION[0]]},
            "only the first of the messages can be a system message",
        ),
        (
            {"messages": [{"role": "tool", "content": "7"}]},
            "field 'messages[0].role' should be 'system', 'user' or 'assistant', found str 'tool'",
        ),
        ({"messages": [{"role": "user"}]}, "field 'messages[0].content' is missing"),
        (
            {"messages": [{"role": "assistant", "content": "\n\nSo 7"}]},
            "an assistant turn begins with a line break, so its start cannot be told: strip its content",
        ),
    ],
)
def test_each_way_a_row_can_be_bad(row, message, tokenizer, tmp_path):
    assert error_of([row], tokenizer, tmp_path) == f"  line 1: {message}"


@pytest.mark.parametrize("name", ["train.json", "train.parquet"])
def test_rows_without_lines_are_known_by_their_number(name, tokenizer, tmp_path):
    rows = [S1K, S1K | {"question": ""}, S1K, S1K | {"attempt": None}]
    assert error_of(rows, tokenizer, tmp_path, name) == (
        "  row 2: field 'question' should not be empty, found str ''\n"
        "  row 4: field 'attempt' should be a valid string, found null"
    )


def test_one_row_can_have_several_problems(tokenizer, tmp_path):
    assert error_of([{"thinking_trajectories": [""], "attempt": 7}], tokenizer, tmp_path) == (
        "  line 1: field 'question' is missing\n"
        "  line 1: field 'thinking_trajectories[0]' should not be empty, found str ''\n"
        "  line 1: field 'attempt' should be a valid string, found int 7"
    )


def test_rows_are_held_to_the_format_of_the_first_known_one(tokenizer, tmp_path):
    assert error_of([{"question": "q"}, S1K, {"text": S1K_TEXT}], tokenizer, tmp_path).split("\n") == [
        "  line 1: field 'thinking_trajectories' is missing",
        "  line 1: field 'attempt' is missing",
        "  line 3: field 'question' is missing",
        "  line 3: field 'thinking_trajectories' is missing",
        "  line 3: field 'attempt' is missing",
    ]


def test_all_kinds_of_problems_are_reported_together_and_in_order(tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    long = S1K | {"thinking_trajectories": ["so 7. " * 500]}
    path.write_text("\n".join([json.dumps(long), "{", json.dumps(S1K), json.dumps(S1K | {"question": 1})]))
    with pytest.raises(InputError) as error:
        load(str(path), tokenizer)
    found = re.findall(r"line (\d): .*?(over|not JSON|question)", str(error.value))
    assert found == [("1", "over"), ("2", "not JSON"), ("4", "question")]


def test_twenty_problems_are_listed_and_all_are_counted(tokenizer, tmp_path):
    path = write(tmp_path / "train.jsonl", [S1K] + [S1K | {"attempt": ""}] * 33)
    with pytest.raises(InputError) as error:
        load(path, tokenizer)
    first, *listed, last = str(error.value).split("\n")
    assert first == f"{path}: 33 problems (lines count from 1)"
    assert [line.split(":")[0] for line in listed] == [f"  line {number}" for number in range(2, 22)]
    assert last == "  ... and 13 more"


def test_a_tokenizer_without_a_chat_template_can_only_take_finished_text(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path)
    tokenizer.chat_template = None
    assert load(write(tmp_path / "text.jsonl", [{"text": S1K_TEXT}]), tokenizer).format == "text"
    with pytest.raises(ValueError, match="no chat template, which rows of format s1K are rendered with"):
        load(write(tmp_path / "train.jsonl", [S1K]), tokenizer)


# Over-long rows


@pytest.fixture
def two_lengths(tokenizer, tmp_path):
    """A file of a short and a long row, and the ids of both."""
    long = S1K | {"attempt": "So it is 7. " * 20}
    path = write(tmp_path / "lengths.jsonl", [S1K, long])
    ids = [example.input_ids for example in load(path, tokenizer, block_size=10_000).examples]
    return path, *ids


def test_overlong_error(two_lengths, tokenizer):
    path, short, long = two_lengths
    with pytest.raises(InputError) as error:
        load(path, tokenizer, block_size=short.size)
    assert str(error.value).endswith(
        f"\n  line 2: {long.size} tokens are over block_size={short.size} (overlong: truncate or drop accepts that)"
    )
    assert load(path, tokenizer, block_size=long.size).rows == 2


def test_a_row_without_a_trained_token_is_no_matter_of_its_length(tokenizer, tmp_path):
    for overlong in ("error", "truncate", "drop"):
        problem = error_of([{"text": "3 + 4 " * 50}], tokenizer, tmp_path, block_size=9, overlong=overlong)
        assert problem.startswith("  line 1: nothing to train on: there is no '<|im_start|>assistant")
        assert "\n" not in problem


def test_overlong_truncate(two_lengths, tokenizer):
    path, short, long = two_lengths
    data = load(path, tokenizer, block_size=short.size, overlong="truncate")
    assert (data.rows, data.truncated, data.dropped) == (2, 1, 0)
    assert data.examples[1].input_ids.tolist() == long[: short.size].tolist()
    assert data.examples[1].loss_mask.size == short.size


def test_truncating_away_all_that_is_trained_is_an_error(two_lengths, tokenizer):
    path = two_lengths[0]
    prompt = int(load(path, tokenizer).examples[0].loss_mask.argmax())
    data = load(path, tokenizer, block_size=prompt + 1, overlong="truncate")
    assert [int(example.loss_mask.sum()) for example in data.examples] == [1, 1]
    with pytest.raises(InputError) as error:
        load(path, tokenizer, block_size=prompt, overlong="truncate")
    assert str(error.value).split("\n")[1:] == [
        f"  line {n}: nothing to train on within block_size={prompt}: the prompt takes {prompt} tokens" for n in (1, 2)
    ]


def test_overlong_drop(two_lengths, tokenizer):
    path, short, _ = two_lengths
    data = load(path, tokenizer, block_size=short.size, overlong="drop")
    assert (data.rows, data.truncated, data.dropped) == (2, 0, 1)
    assert [example.input_ids.tolist() for example in data.examples] == [short.tolist()]
    with pytest.raises(InputError, match=r"lengths.jsonl: all 2 rows are over block_size=9 tokens, none is left"):
        load(path, tokenizer, block_size=9, overlong="drop")


# Summary


def test_summary(tokenizer, tmp_path):
    words = [2] * 5 + [40] * 5
    rows = [{"text": "x" * 10 + "<|im_start|>assistant\n" + " 7" * n} for n in words]
    path = write(tmp_path / "train.jsonl", rows)
    summary = load(path, tokenizer, block_size=50, overlong="truncate").summary
    lengths = [min(50, len(tokenizer.encode(row["text"]))) for row in rows]
    prompt = len(tokenizer.encode("x" * 10 + "<|im_start|>assistant\n"))
    assert (summary.rows, summary.examples, summary.truncated, summary.dropped) == (10, 10, 5, 0)
    assert summary.tokens == sum(lengths)
    assert summary.trained_tokens == sum(lengths) - 10 * prompt
    assert list(summary.lengths) == ["min", "p10", "p50", "p90", "p99", "max", "mean"]
    assert summary.lengths["min"] == min(lengths)
    assert summary.lengths["p90"] == summary.lengths["max"] == 50
    assert summary.lengths["mean"] == round(sum(lengths) / 10)


def test_summary_as_text(tokenizer, tmp_path):
    path = write(tmp_path / "train.jsonl", [{"text": "<|im_start|>assistant\n" + "<|im_end|>" * 200}] * 1000)
    text = str(load(path, tokenizer, block_size=100, overlong="truncate").summary)
    prompt = len(tokenizer.encode("<|im_start|>assistant\n"))
    assert text.split("\n") == [
        f"{path}: 1,000 rows, format text",
        "  examples  1,000 (1,000 truncated, 0 dropped; block_size 100)",
        f"  tokens    100,000, trained on {100_000 - 1000 * prompt:,} of them ({1 - prompt / 100:.1%})",
        "  length    min 100, p10 100, p50 100, p90 100, p99 100, max 100, mean 100",
    ]
