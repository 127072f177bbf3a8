"""The text of one training example, in pieces that the loss is taken over and pieces that it is not.

The text is Qwen's ChatML; s1's has two more headers inside the assistant turn, one before the reasoning and one before
the answer. What comes before a turn that is trained on is the chat template's, as in decoding; the turn itself is what
the row says, followed by the end of turn that the model is to learn.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from s1jax.chat_template import render_chat
from s1jax.tokenizer import encode

THINK_HEADER = "<|im_start|>think\n"
ANSWER_HEADER = "<|im_start|>answer\n"
RESPONSE_MARKER = "<|im_start|>assistant\n"
INSTRUCTION_MARKER = "<|im_start|>user"
TURN_END = "<|im_end|>\n"

_MARKER = re.compile(f"{re.escape(RESPONSE_MARKER)}|{re.escape(INSTRUCTION_MARKER)}")
_TAG = re.compile(r"\s*(<[^<>\s]+>)?\s*")
"""What templates put before and after a thought."""


class UnfaithfulError(ValueError):
    """A row that the chat template, or the markers in it, would make another training text of."""


class Piece(NamedTuple):
    """A part of an example's text, and whether its tokens are trained on."""

    text: str
    trained: bool


def check_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if `<|im_start|>` is not one token, i.e. the tokenizer was not made for ChatML."""
    if len(encode("<|im_start|>", tokenizer)) != 1:
        raise ValueError(
            "the tokenizer has no token <|im_start|>: s1's text needs a ChatML tokenizer, such as Qwen2.5-Instruct's"
        )


def s1_response(trace: str, answer: str) -> str:
    """Reasoning and answer as the assistant's single turn.

    An answer without "Answer:" gets it as a prefix: it is what s1's grader falls back to where there is no
    `\\boxed{}` (s1 repository, data/tokenization.py).
    """
    if "Answer:" not in answer:
        answer = "Answer: " + answer
    return THINK_HEADER + trace.strip() + "\n" + ANSWER_HEADER + answer.strip()


def render_s1(question: str, trace: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """One example of s1: the bare question as the chat template asks it, then the response.

    Only the prompt is rendered: templates put things of their own before an answer (Qwen3's an empty thought).
    Raises TemplateError or UnfaithfulError.
    """
    prompt = render_chat([{"role": "user", "content": question}], tokenizer, add_generation_prompt=True)
    if _turn("user", question) + RESPONSE_MARKER not in prompt:
        raise UnfaithfulError("the chat template does not leave the question as it is")
    return [Piece(prompt, False), Piece(s1_response(trace, answer) + TURN_END, True)]


def render_conversation(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A conversation, every assistant turn of which is trained on, its `<|im_end|>` and the newline after it too.

    A message has `role`, `content` and, if the assistant thought before it, `reasoning_content`. Raises TemplateError,
    or UnfaithfulError if a message would not stand in the text as it is, or something of the template's beside it.
    """
    turns = [_turn_text(messages, i, tokenizer) for i in range(len(messages))]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    before = "".join(turns[:last])
    if last:
        prompt = render_chat(messages[:last], tokenizer, add_generation_prompt=True)
    else:
        # Nothing to ask with: all that can stand in front is the template's own, as a system prompt.
        whole = render_chat(messages[:1], tokenizer, add_generation_prompt=False)
        if not whole.endswith(turns[0]):
            raise UnfaithfulError("the chat template does not leave messages[0].content as it is")
        prompt = whole.removesuffix(turns[0]) + RESPONSE_MARKER
    if not prompt.endswith(before + RESPONSE_MARKER):
        raise UnfaithfulError(_what_is_changed(messages[:last], turns, prompt))
    pieces = [Piece(prompt.removesuffix(before + RESPONSE_MARKER), False)]
    for message, turn in zip(messages, turns, strict=True):
        if message["role"] == "assistant":
            pieces += [Piece(RESPONSE_MARKER, False), Piece(turn.removeprefix(RESPONSE_MARKER), True)]
        else:
            pieces.append(Piece(turn, False))
    return _joined(pieces)


def split_text(text: str) -> list[Piece]:
    """Finished text: what follows a response marker is trained on, up to the next instruction marker.

    It is the rule of the completion-only collator that s1 was trained with (s1 repository, train/sft.py;
    `DataCollatorForCompletionOnlyLM` in trl). Raises UnfaithfulError if a marker stands inside a turn.
    """
    pieces: list[Piece] = []
    trained, start = False, 0
    for number, marker in enumerate(_MARKER.finditer(text)):
        if number and not text[: marker.start()].rstrip().endswith(TURN_END.rstrip()):
            raise UnfaithfulError(f"{marker[0]!r} stands inside a turn, at character {marker.start() + 1}")
        response = marker[0] == RESPONSE_MARKER
        end = marker.end() if response else marker.start()
        # A header is the template's, also where two responses follow one another.
        pieces += [Piece(text[start : marker.start()], trained), Piece(text[marker.start() : end], False)]
        trained, start = response, end
    return _joined([*pieces, Piece(text[start:], trained)])


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}{TURN_END}"


def _turn_text(messages: Sequence[Mapping[str, str]], index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A message's whole turn; how its reasoning is written is the template's to say."""
    message = messages[index]
    content, reasoning = message["content"], message.get("reasoning_content")
    if reasoning is None:
        return _turn(message["role"], content)
    name = f"messages[{index}]"
    text = render_chat(messages[: index + 1], tokenizer, add_generation_prompt=False)
    body, _, turn = text.rpartition(content + TURN_END)
    if turn or not body:
        raise UnfaithfulError(f"the chat template does not leave {name}.content as it is")
    thought = body.rpartition(RESPONSE_MARKER)[2]
    opening, found, closing = thought.partition(reasoning)
    if not (found and _TAG.fullmatch(opening) and _TAG.fullmatch(closing)):
        raise UnfaithfulError(f"the chat template does not have {name}.reasoning_content in it as it is")
    return RESPONSE_MARKER + thought + content + TURN_END


def _what_is_changed(messages: Sequence[Mapping[str, str]], turns: Sequence[str], prompt: str) -> str:
    """Why a rendered prompt does not end with these turns and the header of the next one."""
    before = "".join(turns[: len(messages)]) + RESPONSE_MARKER
    _, found, opened = prompt.rpartition(before)
    if found:
        return f"the chat template opens the assistant's turn with {opened!r}, which the row does not have"
    for index, turn in enumerate(turns[: len(messages)]):
        if turn not in prompt:
            part = "reasoning_content or content" if "reasoning_content" in messages[index] else "content"
            return f"the chat template does not leave messages[{index}].{part} as it is"
    return "the chat template puts something between the messages"


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece, without empty ones."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].trained == piece.trained:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.trained)
        elif piece.text:
            joined.append(piece)
    return joined
