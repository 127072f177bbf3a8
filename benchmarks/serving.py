"""Servers under load, in turns: python -m benchmarks.serving MODEL_DIR --questions GSM8K.jsonl --output DIRECTORY

This project's server and, if the interpreters of their environments are given, transformers' and vLLM's CPU build get
the same questions, which come at random times at each of several rates, as streams, with the same most tokens and,
where there is such a thing, a thinking budget between the delimiters of s1. They take turns at each rate, each as a
new process. DIRECTORY gets serving.json, serving.png and each server's log.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from matplotlib.figure import Figure

from benchmarks.throughput.contest import OURS, ROOT
from s1jax.decoding.profiles import PROFILES
from s1jax.decoding.workload import percentiles
from s1jax.tokenizer import encode, load_tokenizer

START_SECONDS = 600
THINKING = PROFILES["s1"]


@dataclass(frozen=True)
class Answer:
    """One question's stream."""

    tokens: int
    thinking_tokens: int | None
    """None where it does not end, or the server does not say."""
    first_seconds: float
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """One server at one rate."""

    server: str
    rate: float
    tokens_per_second: float
    first_token_seconds: dict[str, float]
    """By percentile over the answers, as are the next."""
    seconds_per_token: dict[str, float]
    budgets_kept: int | None
    """None for a server that has no budgets."""
    most_thinking_tokens: int | None
    """Of an answer whose thinking ended; None if it did in none."""
    answers: int


def command_of(server: str, python: str, model: Path, port: int, dtype: str, output: Path) -> list[str]:
    """What starts a server of a model; what it is given to read is written to `output`."""
    match server:
        case "s1jax":
            words = [f"model.path={model}", f"model.dtype={dtype}", "server.name=model", "batch_size=64"]
            return [python, "decode.py", "serve", *words, f"server.port={port}"]
        case "transformers":
            words = ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--device", "cpu"]
            words += ["--continuous-batching"]
            return [python, "-m", "transformers.cli.transformers", "serve", str(model), *words]
        case "vllm":
            words = ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--served-model-name", "model"]
            # Its prompts open the thinking, as this project's server does by itself.
            template = output / "vllm.jinja"
            opened = f"{{% if add_generation_prompt %}}{THINKING.start}{{% endif %}}"
            template.write_text(load_tokenizer(model).chat_template + opened, encoding="utf-8")
            thinking = {"reasoning_start_str": THINKING.start, "reasoning_end_str": THINKING.end}
            words += ["--chat-template", str(template), "--reasoning-config", json.dumps(thinking)]
            words += ["--max-model-len", "4096", "--gpu-memory-utilization", "0.5"]  # Of the memory, on a CPU too.
            return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *words]
    raise ValueError(f"no such server: {server}")


@contextmanager
def running(server: str, command: list[str], port: int, log: Path) -> Iterator[str]:
    """The URL of a server once it answers; it is ended with all its children. Raises RuntimeError if it does not."""
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        url, started = f"http://127.0.0.1:{port}", time.monotonic()
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - started > START_SECONDS:
                raise RuntimeError(f"{server} does not answer: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def body_of(server: str, model: Path, question: str, budget: int, answer: int) -> dict[str, Any]:
    """The same question in the words of one server; transformers' refuses what it does not know."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": budget + answer,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    match server:
        case "s1jax":
            body |= {"thinking_token_budget": budget}
        case "transformers":
            body |= {"model": str(model)}
        case "vllm":
            body |= {"thinking_token_budget": budget, "return_token_ids": True}
    return body


def before(end: list[int], ids: list[int]) -> int | None:
    """How many ids come before the first place of those of `end`; None if they are not there."""
    places = (place for place in range(len(ids)) if ids[place : place + len(end)] == end)
    return next(places, None)


async def ask(client: httpx.AsyncClient, body: dict[str, Any], end: list[int]) -> Answer:
    """Send one question and read its stream, where ids tell the thinking by its end. Raises httpx.HTTPError."""
    started = time.perf_counter()
    first, chunks, usage = 0.0, 0, None
    ids: list[int] = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        if stream.status_code != 200:
            raise httpx.HTTPError((await stream.aread()).decode())
        async for line in stream.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            part = json.loads(line[6:])
            usage = part.get("usage") or usage
            for choice in part["choices"]:
                ids += choice.get("token_ids") or []
                delta = choice["delta"]
                if delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content"):
                    first = first or time.perf_counter()
                    chunks += 1
    details = (usage or {}).get("completion_tokens_details") or {}
    tokens = (usage or {}).get("completion_tokens") or chunks
    now = time.perf_counter()
    thinking = before(end, ids) if ids else details.get("reasoning_tokens")
    return Answer(tokens, thinking, (first or now) - started, now - started)


async def load(url: str, bodies: list[dict[str, Any]], rate: float, end: list[int]) -> tuple[list[Answer], float]:
    """The answers, and the seconds from the first question to the last token; always the same times between them."""
    waits = np.random.default_rng(0).exponential(1 / rate, len(bodies)).cumsum()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:
        started = time.perf_counter()

        async def later(seconds: float, body: dict[str, Any]) -> Answer:
            await asyncio.sleep(seconds)
            return await ask(client, body, end)

        answers = await asyncio.gather(*map(later, waits - waits[0], bodies))
        return list(answers), time.perf_counter() - started


def measurement(server: str, rate: float, answers: list[Answer], seconds: float, budget: int) -> Measurement:
    """The figures of one load."""
    kept = [a.thinking_tokens is not None and a.thinking_tokens <= budget for a in answers]
    later = [(a.seconds - a.first_seconds) / max(1, a.tokens - 1) for a in answers]
    return Measurement(
        server,
        rate,
        sum(a.tokens for a in answers) / seconds,
        percentiles([a.first_seconds for a in answers]),
        percentiles(later),
        None if server == "transformers" else sum(kept),
        max((a.thinking_tokens for a in answers if a.thinking_tokens is not None), default=None),
        len(answers),
    )


def picture(measurements: list[Measurement]) -> Figure:
    """Throughput and waiting against the rate at which questions come."""
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    throughput, waiting = figure.subplots(1, 2)
    for server in dict.fromkeys(m.server for m in measurements):
        own = [m for m in measurements if m.server == server]
        rates = [m.rate for m in own]
        throughput.plot(rates, [m.tokens_per_second for m in own], marker="o", label=server)
        waiting.plot(rates, [m.first_token_seconds["p50"] for m in own], marker="o", label=server)
    throughput.set(xlabel="questions per second", ylabel="tokens/s", ylim=(0, None))
    waiting.set(xlabel="questions per second", ylabel="median seconds to the first token", ylim=(0, None))
    throughput.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--transformers-python")
    parser.add_argument("--vllm-python")
    parser.add_argument("--count", type=int, default=64, help="questions at each rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="questions per second")
    parser.add_argument("--budget", type=int, default=128, help="thinking tokens")
    parser.add_argument("--answer", type=int, default=64, help="further tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--port", type=int, default=8100)
    words = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    words.output.mkdir(parents=True, exist_ok=True)
    questions = [json.loads(line)["question"] for line in words.questions.open(encoding="utf-8")][: words.count]
    pythons = {OURS: sys.executable, "transformers": words.transformers_python, "vllm": words.vllm_python}
    model = words.model.resolve()
    end = encode(THINKING.end, load_tokenizer(model))
    measurements: list[Measurement] = []
    for rate, (server, python) in product(words.rates, pythons.items()):
        if not python:
            continue
        bodies = [body_of(server, model, question, words.budget, words.answer) for question in questions]
        command = command_of(server, python, model, words.port, words.dtype, words.output)
        with running(server, command, words.port, words.output / f"{server}.log") as url:
            asyncio.run(load(url, bodies[:2], 1.0, end))  # What is compiled or read at first does not count.
            answers, seconds = asyncio.run(load(url, bodies, rate, end))
        measurements.append(measurement(server, rate, answers, seconds, words.budget))
        print(measurements[-1], flush=True)
        content = {"command": sys.argv[1:], "measurements": [asdict(m) for m in measurements]}
        (words.output / "serving.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    picture(measurements).savefig(words.output / "serving.png")


if __name__ == "__main__":
    main()
