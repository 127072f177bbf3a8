import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from s1jax.data import chat
from tests.reference import chat as reference

# Words that make up markers, so that near misses and markers inside content are common.
PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "user", "assistant", "system", "think", "Answer:", "\n", " ", "7", "é"]
)
CONTENT = st.lists(PIECES, min_size=1, max_size=12).map("".join)


def ids_and_mask(text, tokenizer):
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    return ids, chat.loss_mask(ids, chat.turn_markers(tokenizer))


def trained_text(text, tokenizer):
    """What is trained on, a string for each stretch of it."""
    ids, mask = ids_and_mask(text, tokenizer)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]


def test_s1_text_is_exactly_this(tokenizer):
    text = chat.render(chat.s1_messages("What is 3 + 4?", "\n 3 and 4.\nWait, 7. \n", " 7 \n"), tokenizer)
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n"
        "<|im_start|>assistant\n<|im_start|>think\n3 and 4.\nWait, 7.\n<|im_start|>answer\n"
        "Answer:  7<|im_end|>\n"
    )


def test_an_answer_that_says_answer_gets_no_second_one(tokenizer):
    text = chat.render(chat.s1_messages("q", "t", "It is so.\nAnswer: 7"), tokenizer)
    assert text.endswith("<|im_start|>answer\nIt is so.\nAnswer: 7<|im_end|>\n")


@given(question=CONTENT, trace=CONTENT, answer=CONTENT)
def test_s1_text_agrees_with_the_reference(tokenizer, question, trace, answer):
    text = chat.render(chat.s1_messages(question, trace, answer), tokenizer)
    assert text == reference.s1_text(question, trace, answer)


@given(
    system=st.none() | CONTENT,
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CONTENT), min_size=1, max_size=5),
)
def test_conversations_agree_with_the_reference(tokenizer, system, turns):
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": role, "content": content} for role, content in turns]
    text = chat.render(messages, tokenizer)
    assert text == reference.conversation_text(messages)

    ids, mask = ids_and_mask(text, tokenizer)
    markers = chat.turn_markers(tokenizer)
    assert mask.dtype == bool
    assert mask.tolist() == reference.loss_mask(ids.tolist(), *(marker.tolist() for marker in markers))


MARKER = st.lists(st.integers(0, 3), min_size=2, max_size=3)


@given(response=MARKER, instruction=MARKER, data=st.data())
def test_any_markers_in_any_ids_agree_with_the_reference(response, instruction, data):
    piece = st.sampled_from([response, instruction]) | st.integers(0, 3).map(lambda token: [token])
    ids = [token for part in data.draw(st.lists(piece, max_size=12)) for token in part]
    markers = chat.TurnMarkers(np.array(response, np.int32), np.array(instruction, np.int32))
    mask = chat.loss_mask(np.array(ids, np.int32), markers)
    assert mask.tolist() == reference.loss_mask(ids, response, instruction)


def test_the_whole_response_is_trained_on_and_nothing_else(tokenizer):
    text = chat.render(chat.s1_messages("How many apples?", "Let me check.", "5"), tokenizer)
    assert trained_text(text, tokenizer) == [
        "<|im_start|>think\nLet me check.\n<|im_start|>answer\nAnswer: 5<|im_end|>\n"
    ]


def test_every_assistant_turn_is_trained_on(tokenizer):
    turns = [("user", "3 + 4?"), ("assistant", "7"), ("user", "So?"), ("assistant", "12")]
    messages = [{"role": role, "content": content} for role, content in [("system", "Be brief."), *turns]]
    text = chat.render(messages, tokenizer)
    assert trained_text(text, tokenizer) == ["7<|im_end|>\n", "12<|im_end|>\n"]


def test_a_closing_user_turn_is_not_trained_on(tokenizer):
    turns = [("user", "3 + 4?"), ("assistant", "7"), ("user", "thanks")]
    text = chat.render([{"role": role, "content": content} for role, content in turns], tokenizer)
    assert trained_text(text, tokenizer) == ["7<|im_end|>\n"]


def test_markers_are_several_tokens(tokenizer):
    start, newline = tokenizer.convert_tokens_to_ids(["<|im_start|>", "Ċ"])
    markers = chat.turn_markers(tokenizer)
    assert markers.response[0] == markers.instruction[0] == start
    assert markers.response[-1] == newline
    assert markers.response.size >= 3
    assert markers.instruction.size >= 2


def test_a_tokenizer_without_chatml_is_refused():
    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "<": 1, "|": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"has no token <\|im_start\|>: s1's text needs a ChatML tokenizer"):
        chat.turn_markers(PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]"))
