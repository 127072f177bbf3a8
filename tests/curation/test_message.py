"""Where the trace is found in a message, and what is no message."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1jax.curation.distill import distill
from s1jax.curation.endpoint import FailureError
from s1jax.curation.message import Reply, read_reply, read_usage
from tests.curation.conftest import rows, write_questions
from tests.curation.server import serving
from tests.curation.test_distill import teacher

SHAPES: list[dict[str, Any]] = [
    {"content": "B", "reasoning_content": "A"},
    {"content": "B", "reasoning": "A"},
    {"content": "B", "reasoning_content": None, "reasoning": "A"},
    {"content": "<think>A</think>B"},
    {"content": "<think>\nA\n</think>\n\nB\n"},
    {"content": "\n<think>A</think>B", "reasoning_content": ""},
    {"content": "A</think>B"},
    {"content": "<thought>A</thought>B"},
    {"content": [{"type": "thinking", "thinking": "A"}, {"type": "text", "text": "B"}]},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "A"}]}, {"type": "text", "text": "B"}]},
    {"content": [{"type": "thought", "text": "A"}, {"type": "text", "text": "B"}]},
    {"content": [{"text": "A", "thought": True}, {"text": "B"}]},
    {"content": [{"type": "text", "text": "<think>A</think>"}, {"type": "text", "text": "B"}]},
]


@pytest.mark.parametrize("message", SHAPES)
def test_the_trace_is_found(message: dict[str, Any]) -> None:
    reply = read_reply({"choices": [{"message": message, "finish_reason": "stop"}]})
    assert (reply.trace, reply.text, reply.cut) == ("A", "B", False)


def test_the_trace_is_found_over_http(tmp_path: Path) -> None:
    names = [str(index) for index in range(len(SHAPES))]
    with serving(reply=lambda content: SHAPES[int(content.partition("\n")[0])]) as server:
        output = write_questions(tmp_path, names)
        assert distill(teacher(server), output)["done"] == len(SHAPES)
        assert [(row["trace"], row["answer"]) for row in rows(output / "traces.jsonl")] == [("A", "B")] * len(SHAPES)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": "B"}, "no trace"),
        ({"content": "B", "reasoning_content": " "}, "no trace"),
        ({"content": None, "reasoning_content": "A"}, "no answer"),
        ({"content": []}, "no trace and no answer"),
        ({"content": "<think>A"}, "no trace"),
        ({"content": "<think>A</think>"}, "no answer"),
        ({"content": "<think>A</think>B<think>C</think>"}, "think tags in the answer"),
    ],
)
def test_a_message_without_trace_or_answer_fails(message: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with serving(reply=lambda content: message) as server:
        output = write_questions(tmp_path, ["0"])
        distill(teacher(server, max_rubbish_retries=2), output)
        (row,) = rows(output / "traces.jsonl")
        assert (row["status"], row["reason"], row["trace"], row["answer"]) == ("failed", reason, None, None)
        assert server.asked["0"] == 3


@given(
    trace=st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"])),
    answer=st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"])),
)
def test_tags_and_fields_say_the_same(trace: str, answer: str) -> None:
    def read(message: dict[str, Any]) -> tuple[str, str]:
        reply = read_reply({"choices": [{"message": message}]})
        return reply.trace, reply.text

    tags = read({"content": f"<think>{trace}</think>{answer}"})
    assert tags == read({"content": answer, "reasoning_content": trace}) == (trace.strip(), answer.strip())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "usage", "text", "type"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


PARTS = st.lists(st.dictionaries(st.sampled_from(["text", "thinking", "thought", "type"]), JSON | st.just("thinking")))
MESSAGES = st.fixed_dictionaries({"content": PARTS | JSON}, optional={"reasoning": JSON, "reasoning_content": JSON})
COMPLETIONS = st.fixed_dictionaries({"choices": st.lists(st.fixed_dictionaries({"message": MESSAGES}), min_size=1)})


@given(response=st.dictionaries(st.sampled_from(["choices", "usage"]), JSON) | COMPLETIONS)
def test_any_object_is_a_reply_or_a_failure(response: dict[str, Any]) -> None:
    usage = read_usage(response)
    assert usage is None or min(usage.prompt_tokens, usage.completion_tokens) >= 0
    try:
        reply: object = read_reply(response)
    except FailureError as error:
        reply = error
    # Any other exception fails the test.
    assert isinstance(reply, Reply) or str(reply).startswith("not a chat completion: choices")


def test_every_line_of_a_result_is_one_line() -> None:
    text = "a\nb\u2028c\x85d\re\x00"
    with tempfile.TemporaryDirectory() as directory:
        with serving(reply=lambda content: {"content": text, "reasoning_content": text}) as server:
            output = write_questions(Path(directory), ["0", "1"])
            distill(teacher(server), output)
        traces = (output / "traces.jsonl").read_bytes()
        assert traces.count(b"\n") == 2
