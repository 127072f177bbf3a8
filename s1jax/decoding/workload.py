"""Requests of many lengths that come over time, through the engine: tokens/s, and what each of them waits for."""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from s1jax.config import BenchmarkSection
from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.engine import Engine
from s1jax.decoding.profiles import DelimiterProfile, PreparedPrompt, ProfileIds
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished
from s1jax.model.load import LoadedModel
from s1jax.model.paged_attention import PAGE

SIGMA = 0.8
"""Spread of the logarithm of a length."""
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Moment:
    """What the engine holds after a chunk."""

    seconds: float
    """Since the first request came."""
    rows: int
    """At work."""
    live_tokens: int
    """In the contexts of these rows."""
    used_pages: int
    """Of the cache, in all rows; of `paged_attention.PAGE` tokens."""
    pages: int
    """Of the cache."""


@dataclass(frozen=True)
class Workload:
    """All requests at one batch size; seconds, by percentile where there are several."""

    batch_size: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    """From the first request to the last result, prefill included."""
    tokens_per_second: float
    """Of the output."""
    first_token_seconds: dict[str, float]
    """From when a request comes to the end of the chunk with its first token."""
    seconds_per_token: dict[str, float]
    """From the start of a request's first chunk to the end of its last, for each token."""
    moments: list[Moment]


def run_workload(loaded: LoadedModel, section: BenchmarkSection, batch_size: int) -> Workload:
    """Decode `section.requests` requests, once to compile and once to measure."""
    vocab_size = loaded.model.config.vocab_size
    requests, arrivals = _requests(section, vocab_size)
    engine = Engine(loaded, no_words(), unending(vocab_size), batch_size=batch_size)
    for _ in engine.run(requests):
        pass
    waiting = list(zip(arrivals, requests, strict=True))[::-1]
    begun: dict[int, float] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    moments = []
    started = time.perf_counter()
    while waiting or not engine.is_idle:
        now = time.perf_counter() - started
        while waiting and waiting[-1][0] <= now:
            engine.submit(waiting.pop()[1])
        if engine.is_idle:
            time.sleep(waiting[-1][0] - now)
            continue
        before, events = now, engine.step()
        now = time.perf_counter() - started
        moments.append(Moment(now, *engine.occupancy))
        for event in events:
            if isinstance(event, Finished):
                last[event.request.index] = now
            elif event.output_ids:
                begun.setdefault(event.request.index, before)
                first.setdefault(event.request.index, now)
    lengths = [request.budget.max_answer_tokens or 0 for request in requests]
    return Workload(
        batch_size=batch_size,
        requests=len(requests),
        prompt_tokens=section.prompt_length * len(requests),
        output_tokens=sum(lengths),
        seconds=max(last.values()),
        tokens_per_second=sum(lengths) / max(last.values()),
        first_token_seconds=percentiles([first[i] - came for i, came in enumerate(arrivals)]),
        seconds_per_token=percentiles([(last[i] - begun[i]) / n for i, n in enumerate(lengths)]),
        moments=moments,
    )


def picture(workloads: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of `Workload`s as JSON has them: throughput against latency, and the cache of the last over time."""
    figure = Figure(figsize=(9.6, 4), layout="constrained")
    curve, over_time = figure.subplots(1, 2)
    waits = [workload["first_token_seconds"]["p50"] for workload in workloads]
    rates = [workload["tokens_per_second"] for workload in workloads]
    curve.plot(waits, rates, marker="o")
    for workload, x, y in zip(workloads, waits, rates, strict=True):
        curve.annotate(f"{workload['batch_size']} rows", (x, y), textcoords="offset points", xytext=(6, 4))
    curve.set(xlabel="median seconds to the first token", ylabel="tokens/s", xlim=(0, None), ylim=(0, None))
    moments = workloads[-1]["moments"]
    seconds = [moment["seconds"] for moment in moments]
    for name, size, label in (("used_pages", PAGE, "tokens in used pages"), ("live_tokens", 1, "live tokens")):
        over_time.step(seconds, [size * moment[name] for moment in moments], where="pre", label=label)
    over_time.set(xlabel="seconds", title=f"{workloads[-1]['batch_size']} rows", ylim=(0, None))
    over_time.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _requests(section: BenchmarkSection, vocab_size: int) -> tuple[list[Request], list[float]]:
    """The requests, and when each comes, in seconds, ascending; always the same."""
    assert section.requests is not None
    rng = np.random.default_rng(0)
    mean, longest = lengths_of(section.lengths)
    centre = np.log(mean) - SIGMA**2 / 2
    lengths = np.clip(rng.lognormal(centre, SIGMA, section.requests).astype(int), 1, longest).tolist()
    gaps = np.zeros(section.requests) if section.rate is None else rng.exponential(1 / section.rate, section.requests)
    prompts = rng.integers(0, vocab_size, (section.requests, section.prompt_length))
    budgets = [ThinkingBudget(wait="", max_answer_tokens=length) for length in lengths]
    requests = [
        Request(PreparedPrompt(tuple(prompt.tolist()), 0, False), budget, index)
        for index, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True))
    ]
    return requests, (np.cumsum(gaps) - gaps[0]).tolist()


def lengths_of(text: str) -> tuple[int, int]:
    """Mean and longest of lognormal:MEAN:MAX."""
    _, mean, longest = text.split(":")
    return int(mean), int(longest)


def unending(vocab_size: int) -> ProfileIds:
    """A profile by which rows answer at once, and end when they have all their tokens."""
    none, every = np.zeros(vocab_size, bool), np.ones(vocab_size, bool)
    return ProfileIds(DelimiterProfile("unending", eos=("?",)), (), (), (), (), (), (), (), none, every)


def no_words() -> PreTrainedTokenizerBase:
    """A tokenizer without words: a model's directory may have none, and nobody reads what is decoded here."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Those that a report has, as p50 and so on."""
    return {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}
