"""What is trained on is what the row says: in the text as it is, and in the loss mask exactly."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from s1jax.data import chat
from s1jax.data.examples import load_examples
from s1jax.jsonl import InputError
from tests.reference import chat as reference
from tests.templates import QWEN3, QWQ, TRIMMED

# Words that make up markers, so that near misses and markers inside content are common.
PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "user", "assistant", "system", "think", "Answer:", "\n", " ", "7", "é"]
)
CONTENT = st.lists(PIECES, min_size=1, max_size=12).map("".join)
PROMPT = "<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n"


def texts(pieces: list[chat.Piece]) -> tuple[str, list[str]]:
    """The whole text, and what is trained on of it."""
    return "".join(piece.text for piece in pieces), [piece.text for piece in pieces if piece.trained]


def with_template(tokenizer: PreTrainedTokenizerBase, template: str, directory: Path) -> PreTrainedTokenizerBase:
    tokenizer.save_pretrained(directory / "tokenizer")
    own = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer")
    own.chat_template = template
    return own


def turn(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


@given(question=CONTENT, trace=CONTENT, answer=CONTENT)
def test_s1_text_agrees_with_the_reference_whatever_stands_in_it(tokenizer, question, trace, answer):
    text, trained = texts(chat.render_s1(question, trace, answer, tokenizer))
    assert text == reference.s1_text(question, trace, answer)
    assert trained == [chat.s1_response(trace, answer) + "<|im_end|>\n"]


@given(
    system=st.none() | CONTENT,
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENT), min_size=1, max_size=5),
)
def test_every_assistant_turn_of_a_conversation_is_trained_on(tokenizer, system, turns):
    messages = [turn("system", system)] if system is not None else []
    messages += [turn(role, content) for role, content in [*turns, ("assistant", "7")]]
    text, trained = texts(chat.render_conversation(messages, tokenizer))
    assert text == reference.conversation_text(messages)
    assert trained == [m["content"] + "<|im_end|>\n" for m in messages if m["role"] == "assistant"]


def test_an_answer_that_says_answer_gets_no_second_one(tokenizer):
    text, _ = texts(chat.render_s1("q", "t", "It is so.\nAnswer: 7", tokenizer))
    assert text.endswith("<|im_start|>answer\nIt is so.\nAnswer: 7<|im_end|>\n")


def test_a_template_adds_no_empty_thought_to_s1s_trace(tokenizer, tmp_path):
    text, trained = texts(chat.render_s1("3 + 4?", "t", "7", with_template(tokenizer, QWEN3, tmp_path)))
    assert text == PROMPT + trained[0]
    assert trained == ["<|im_start|>think\nt\n<|im_start|>answer\nAnswer: 7<|im_end|>\n"]


# Whole rows: the ids and the mask, or the row is refused

ASKED = turn("user", "3 + 4?")
LATER = [turn("user", "So?"), turn("assistant", "12")]
THOUGHT = "<think>\nI add.\n</think>\n\n"
TRAINED = [
    ("reasoning_content", QWEN3, [ASKED, turn("assistant", "7", reasoning_content="I add.")], [THOUGHT + "7"]),
    ("reasoning", QWEN3, [ASKED, turn("assistant", "7", reasoning="I add.")], [THOUGHT + "7"]),
    ("blank reasoning", QWEN3, [ASKED, turn("assistant", "7", reasoning_content=" ")], ["7"]),
    ("no reasoning", QWEN3, [ASKED, turn("assistant", "7")], ["7"]),
    ("several turns", QWEN3, [ASKED, turn("assistant", "7"), *LATER], ["7", "12"]),
    ("a closing user turn", QWEN3, [ASKED, turn("assistant", "7"), turn("user", "thanks")], ["7"]),
    ("markers in a question", QWEN3, [turn("user", "<|im_start|>assistant\nNo"), turn("assistant", "7")], ["7"]),
    ("markers in an answer", QWEN3, [ASKED, turn("assistant", "a<|im_start|>user b")], ["a<|im_start|>user b"]),
    ("a null key", QWEN3, [ASKED, turn("assistant", "7", tool_calls=None)], ["7"]),
]
REFUSED = [
    ("thought left out", None, [ASKED, turn("assistant", "7", reasoning_content="I add.")], "reasoning_content"),
    ("thought of history", QWEN3, [ASKED, turn("assistant", "7", reasoning_content="I add."), *LATER], "messages[1]"),
    ("written thought", QWEN3, [ASKED, turn("assistant", THOUGHT + "7"), *LATER], "messages[1].content"),
    ("opened thought", QWQ, [ASKED, turn("assistant", "7")], "opens the assistant's turn with '<think>"),
    ("trimmed", TRIMMED, [turn("user", " 3 + 4? "), turn("assistant", "7")], "messages[0].content as it is"),
    ("two thoughts", QWEN3, [ASKED, turn("assistant", "7", reasoning="a", reasoning_content="b")], "another"),
    ("a user's thought", QWEN3, [turn("user", "q", reasoning="a"), turn("assistant", "7")], "not the assistant's"),
    ("tool calls", QWEN3, [ASKED, turn("assistant", "7", tool_calls=[{}])], "'tool_calls'"),
    ("raises", "{{ raise_exception('Roles must\nalternate') }}", [ASKED, turn("assistant", "7")], "Roles must altern"),
]


def load(messages, tokenizer, template, directory: Path):
    file = directory / "rows.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    own = tokenizer if template is None else with_template(tokenizer, template, directory)
    return load_examples(str(file), own, block_size=1000, overlong="error")


@pytest.mark.parametrize(("template", "messages", "trained"), [c[1:] for c in TRAINED], ids=[c[0] for c in TRAINED])
def test_a_row_is_trained_on_as_it_is(template, messages, trained, tokenizer, tmp_path):
    (example,) = load(messages, tokenizer, template, tmp_path).examples
    found = tokenizer.decode(example.input_ids[example.loss_mask].tolist())
    assert found == "".join(text + "<|im_end|>\n" for text in trained)


@pytest.mark.parametrize(("template", "messages", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_a_row_that_would_be_changed_is_refused_by_its_line(template, messages, message, tokenizer, tmp_path):
    with pytest.raises(InputError) as error:
        load(messages, tokenizer, template, tmp_path)
    assert "line 1: " in str(error.value)
    assert message in str(error.value)


def test_finished_text_with_a_marker_inside_a_turn_is_refused():
    whole = PROMPT + "7<|im_end|>\n"
    assert texts(chat.split_text(whole)) == (whole, ["7<|im_end|>\n"])
    for inside in ("<|im_start|>user", "<|im_start|>assistant\n"):
        with pytest.raises(chat.UnfaithfulError, match="stands inside a turn, at character"):
            chat.split_text(PROMPT + f"I quote {inside} here<|im_end|>\n")


def test_a_tokenizer_without_chatml_is_refused():
    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "<": 1, "|": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"has no token <\|im_start\|>: s1's text needs a ChatML tokenizer"):
        chat.check_chatml(PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]"))
