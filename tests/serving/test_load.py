"""A thousand requests at once, of every kind: each budget exact, each answer the one that it gets alone."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from s1jax.decoding.profiles import PROFILES, tokenize_profile
from s1jax.tokenizer import load_tokenizer
from tests.server import Server, memory

QUESTIONS = ["How many apples does she have?", "the sum of 3 and 4", "Let me check this again step by step. So 12 * 5"]
KINDS = 100
REQUESTS = 1000


def bodies() -> list[dict[str, Any]]:
    """Different requests, the same each time."""
    draw = random.Random(3)
    made = []
    for number in range(KINDS):
        most = draw.randrange(60)
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": draw.choice(QUESTIONS)}],
            "thinking_budget": most,
            "max_answer_tokens": draw.randrange(1, 16),
            "temperature": draw.choice([0.0, 0.7, 1.0]),
            "seed": number,
            "return_token_ids": True,
        }
        if draw.random() < 0.4:
            body["min_thinking_tokens"] = draw.randrange(most + 1)
        if draw.random() < 0.4:
            body |= {"num_ignore": draw.randrange(1, 4), "wait": draw.choice(["Wait", ["So", "Wait"]])}
        if draw.random() < 0.2:
            body["stop"] = draw.choice(["e", "the", "7"])
        made.append(body)
    return made


def said(answer: dict[str, Any]) -> dict[str, Any]:
    """What of an answer must not depend on the others."""
    return {key: answer[key] for key in ("choices", "usage")}


def check_budget(body: dict[str, Any], answer: dict[str, Any], endings: set[tuple[int, ...]]) -> None:
    """The thinking, counted in the ids up to its end, is as long as it had to be."""
    report = answer["choices"][0]["s1jax"]
    ids, thinking = report["output_ids"], answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    if report["thinking_end"] is None:
        assert body["stop"] in answer["choices"][0]["message"]["reasoning"] + body["stop"]
        assert thinking <= body["thinking_budget"]
        return
    assert any(tuple(ids[thinking : thinking + len(ending)]) == ending for ending in endings)
    assert thinking <= body["thinking_budget"]
    if report["thinking_end"] == "budget":
        assert thinking == body["thinking_budget"]
        assert report["forced"][thinking]
    else:
        assert thinking >= body.get("min_thinking_tokens", 0)


async def ask(client: httpx.AsyncClient, body: dict[str, Any], *, leave: bool) -> dict[str, Any] | None:
    """The answer, or None to a client that leaves after the first part of it."""
    if not leave:
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        whole: dict[str, Any] = answer.json()
        return whole
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: ") and json.loads(line[6:])["choices"]:
                return None
    return None


async def ask_all(server: Server, asked: list[tuple[dict[str, Any], bool]]) -> list[dict[str, Any] | None]:
    """All at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        return await asyncio.gather(*(ask(client, body, leave=leave) for body, leave in asked))


@pytest.mark.slow
def test_a_thousand_at_once(server: Server, model: Path) -> None:
    profile = tokenize_profile(PROFILES["s1"], load_tokenizer(model), 384)
    endings = {profile.end, profile.budget_end, profile.budget_end_with_newline}
    kinds = bodies()
    with server.client as client:
        alone = [client.post("/v1/chat/completions", json=body).json() for body in kinds]
        for body, answer in zip(kinds, alone, strict=True):
            check_budget(body, answer, endings)
        assert {answer["choices"][0]["s1jax"]["thinking_end"] for answer in alone} >= {"budget", "eos"}
        draw = random.Random(5)
        asked = [(number % KINDS, draw.random() < 0.1) for number in range(REQUESTS)]
        draw.shuffle(asked)
        sent = [({**kinds[kind], "priority": draw.randrange(-2, 3)}, leave) for kind, leave in asked]
        asyncio.run(ask_all(server, sent[:200]))
        before = memory(server)
        answers = asyncio.run(ask_all(server, sent))
        assert memory(server) - before < 50 * 1024
        for (kind, leave), answer in zip(asked, answers, strict=True):
            assert leave or (answer and said(answer) == said(alone[kind]))
        client.post("/v1/chat/completions", json={**kinds[0], "stop": None})
        metrics = client.get("/metrics").text
    for name in ("rows_at_work", "answers_waiting", "pages_used"):
        assert f"s1jax_{name} 0.0" in metrics, metrics
