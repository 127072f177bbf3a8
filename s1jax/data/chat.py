"""The text of one s1 training example, and which of its tokens the loss is taken over.

The text is Qwen's ChatML with two more headers inside the assistant turn, one before the reasoning and one
before the answer. Markers are looked for in token ids, where each is several tokens.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32
from transformers import PreTrainedTokenizerBase

THINK_HEADER = "<|im_start|>think\n"
ANSWER_HEADER = "<|im_start|>answer\n"
RESPONSE_MARKER = "<|im_start|>assistant\n"
INSTRUCTION_MARKER = "<|im_start|>user"


class TurnMarkers(NamedTuple):
    """Token ids that open a turn which is trained on (`response`), and one which is not (`instruction`)."""

    response: Int32[np.ndarray, " tokens"]
    instruction: Int32[np.ndarray, " tokens"]


def s1_messages(question: str, trace: str, answer: str) -> list[dict[str, str]]:
    """One example as a conversation: the bare question, then reasoning and answer in a single turn.

    An answer without "Answer:" gets it as a prefix: it is what s1's grader falls back to where there is no
    `\\boxed{}` (s1 repository, data/tokenization.py).
    """
    if "Answer:" not in answer:
        answer = "Answer: " + answer
    response = THINK_HEADER + trace.strip() + "\n" + ANSWER_HEADER + answer.strip()
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation as text, by the tokenizer's own chat template.

    Qwen's template puts its default system prompt in front where `messages` begin with no system message.
    """
    return tokenizer.apply_chat_template(messages, tokenize=False)


def turn_markers(tokenizer: PreTrainedTokenizerBase) -> TurnMarkers:
    """The turn markers in this tokenizer's ids.

    Raises:
        ValueError: if `<|im_start|>` is not one token, i.e. the tokenizer was not made for ChatML.
    """
    ids = {
        text: np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        for text in ("<|im_start|>", RESPONSE_MARKER, INSTRUCTION_MARKER)
    }
    if ids["<|im_start|>"].size != 1:
        raise ValueError(
            "the tokenizer has no token <|im_start|>: s1's text needs a ChatML tokenizer, such as Qwen2.5-Instruct's"
        )
    return TurnMarkers(ids[RESPONSE_MARKER], ids[INSTRUCTION_MARKER])


def find_marker(input_ids: Int[np.ndarray, " length"], marker: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " found"]:
    """Indices in `input_ids` where `marker` starts, ascending."""
    if input_ids.size < marker.size:
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(input_ids, marker.size)
    return np.flatnonzero((windows == marker).all(axis=1))


def loss_mask(input_ids: Int[np.ndarray, " length"], markers: TurnMarkers) -> Bool[np.ndarray, " length"]:
    """Which tokens are trained on: those after a response marker and before the next instruction marker.

    Every assistant turn is trained on, with the headers inside it, its `<|im_end|>` and the newline after
    that; the markers themselves are not. It is the rule of the completion-only collator that s1 was trained
    with (s1 repository, train/sft.py; `DataCollatorForCompletionOnlyLM` in trl).
    """
    mask = np.zeros(input_ids.size, bool)
    instructions = find_marker(input_ids, markers.instruction)
    for start in find_marker(input_ids, markers.response) + markers.response.size:
        following = instructions[instructions >= start]
        mask[start : following[0] if following.size else None] = True
    return mask
