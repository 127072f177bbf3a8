"""A real server, asked by the client that most people use."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server import QUESTION, Server, running


def test_a_budget_is_exact_and_a_stream_says_what_the_whole_does(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "temperature": 1.0, "seed": 7, "n": 2}
        extra = {"thinking_budget": 20, "min_thinking_tokens": 20, "return_token_ids": True}
        whole = client.chat.completions.create(**asked, extra_body=extra)
        stream = client.chat.completions.create(
            **asked, extra_body=extra, stream=True, stream_options={"include_usage": True}
        )
        texts = [{"reasoning": "", "content": ""} for _ in range(2)]
        for part in stream:
            for choice in part.choices:
                for kind in ("reasoning", "content"):
                    texts[choice.index][kind] += getattr(choice.delta, kind, None) or ""
            usage = part.usage
    assert usage == whole.usage
    for choice, text in zip(whole.choices, texts, strict=True):
        message: Any = choice.message
        assert (message.reasoning, message.content) == (text["reasoning"], text["content"])
        report = choice.model_extra["s1jax"]
        assert report["thinking_end"] == "budget"
        # Nothing is forced before the end of the thinking.
        assert report["forced"].index(True) == 20
    assert whole.usage.completion_tokens_details.reasoning_tokens == 2 * 20


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("chat/completions", {"messages": QUESTION, "thinking_buget": 5}, "thinking_buget"),
        (
            "chat/completions",
            {"messages": QUESTION, "thinking_budget": 5, "reasoning_effort": "high"},
            "reasoning_effort",
        ),
        ("chat/completions", {"messages": QUESTION, "tools": [{}]}, "tools"),
        ("completions", {"prompt": []}, "prompt"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(server: Server, path: str, body: Any, field: str) -> None:
    with server.client as client:
        answer = client.post(f"/v1/{path}", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert client.post(f"/v1/{path}", content=b"{", headers={"content-type": "application/json"}).status_code == 400


@pytest.mark.slow
def test_the_keys_of_its_model_and_cache_are_those_of_every_command(model: Path, tmp_path: Path) -> None:
    body = {"prompt": "the sum of 3 and 4 is", "thinking_budget": 40, "seed": 1, "logprobs": 1, "max_tokens": 90}
    words = ["model.weights=int8", "cache.dtype=int8", "cache.tokens=512"]
    with running(model, tmp_path / "log", words) as server, server.client as client:
        few = client.post("/v1/completions", json=body).json()["choices"][0]
        assert "s1jax_pages 8.0" in client.get("/metrics").text
    with running(model, tmp_path / "log", ["model.weights=int8"]) as server, server.client as client:
        more = client.post("/v1/completions", json=body).json()["choices"][0]
    assert few["logprobs"]["token_logprobs"] != more["logprobs"]["token_logprobs"]


def test_who_goes_away_frees_the_row(server: Server) -> None:
    body = {"messages": QUESTION, "stream": True, "min_thinking_tokens": 300, "max_answer_tokens": 5}
    with server.client as client:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        alone = client.post("/v1/chat/completions", json={"messages": QUESTION, "thinking_budget": 5})
        assert alone.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5
        assert "s1jax_rows_at_work 0.0" in _settled(client)


def _settled(client: httpx.Client) -> str:
    """The metrics, after one more request: what is counted is what there was after its last chunk."""
    client.post("/v1/chat/completions", json={"messages": QUESTION, "thinking_budget": 0, "max_answer_tokens": 1})
    return client.get("/metrics").text
