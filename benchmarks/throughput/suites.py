"""What is compared: each suite starts its contenders, lets them take turns, and yields comparisons."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from benchmarks.throughput.contest import OURS, THREADS, Comparison, Contender, contenders, take_turns
from s1jax.demo.tokenizer import build_tokenizer
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_model
from s1jax.model.qwen import Qwen

_PROMPT, _NEW_TOKENS = 64, 65
"""Prompts short enough, and steps many enough, that the noise of prefill does not drown what is measured."""
_SMALL: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 11,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
"""About 20 million parameters with a vocabulary of 512."""


@dataclass(frozen=True)
class Arena:
    """What the suites are run with."""

    model: Path
    """A Qwen2.5-0.5B, or another model that fits three times."""
    questions: Path
    """JSONL with `question`, such as GSM8K's."""
    pythons: dict[str, str]
    """Of each contender, the interpreter of its environment."""
    rounds: int

    def without_vllm(self) -> dict[str, str]:
        """The contenders for what vLLM does not do, or does not do with few enough words."""
        return {name: python for name, python in self.pythons.items() if name != "vllm"}

    def texts(self, count: int) -> list[str]:
        """The first questions."""
        with self.questions.open(encoding="utf-8") as lines:
            return [json.loads(line)["question"] for line, _ in zip(lines, range(count), strict=False)]


def _load(player: Contender, model: Path, dtype: str, action: str = "load") -> dict[str, Any]:
    versions: dict[str, Any] = player.do(action, model=str(model), dtype=dtype, threads=THREADS).result
    return versions


def _turns(players: list[Contender], measure: Callable[[Contender], float], rounds: int) -> dict[str, list[float]]:
    by_name = {player.name: player for player in players}
    return take_turns(by_name, lambda name: measure(by_name[name]), rounds)


def decode(dtype: str, goals: dict[int, float], arena: Arena) -> Iterator[Comparison]:
    """Seconds of one greedy decode step, prefill taken off, and at batch 1 those of reading the weights."""
    tokenizer = AutoTokenizer.from_pretrained(arena.model)
    ids = tokenizer(" ".join(arena.texts(100))).input_ids
    with contenders(arena.pythons) as players:
        versions = {player.name: _load(player, arena.model, dtype) for player in players}
        for batch, goal in goals.items():
            prompts = [ids[row * _PROMPT : (row + 1) * _PROMPT] for row in range(batch)]
            yield _decode_steps(players, prompts, arena.rounds, f"{dtype}, batch {batch}", goal, versions)


def _decode_steps(
    players: list[Contender],
    prompts: list[list[int]],
    rounds: int,
    case: str,
    goal: float,
    versions: dict[str, dict[str, Any]],
    suite: str = "decode",
) -> Comparison:
    written: dict[str, list[list[int]]] = {}
    reads: list[float] = []

    def measure(player: Contender) -> float:
        first = player.do("generate", prompts=prompts, new_tokens=1).seconds
        answer = player.do("generate", prompts=prompts, new_tokens=_NEW_TOKENS)
        written[player.name] = answer.result
        # Of a small model's many small weights the calls would be timed, not the reading.
        if player.name == OURS and len(prompts) == 1 and suite == "decode":
            reads.append(player.do("read").result)
        return (answer.seconds - first) / (_NEW_TOKENS - 1)

    seconds = _turns(players, measure, rounds)
    same = {
        name: f"{sum(a == b for a, b in zip(rows, written[OURS], strict=True))} of {len(rows)}"
        for name, rows in written.items()
        if name != OURS
    }
    notes: dict[str, Any] = {"rows with the same tokens": same}
    if reads:
        # The first round does not count, and its read compiles.
        notes["seconds to read the weights"] = reads[1:]
    settings = {"prompt tokens": len(prompts[0]), "new tokens": _NEW_TOKENS}
    return Comparison(suite, case, goal, seconds, settings, versions, notes)


def forced(arena: Arena) -> Iterator[Comparison]:
    """Seconds for 32 questions with a thinking budget of 256 and two Waits, in float32."""
    count, thinking, waits, answer = 32, 256, 2, 32
    tokenizer = AutoTokenizer.from_pretrained(arena.model)

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    prompts = []
    for text in arena.texts(count):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        prompts.append(ids(chat + "<|im_start|>think"))
    eos = ids("<|im_end|>") + ids("<|endoftext|>")
    words = {
        "prompts": prompts,
        "thinking": thinking,
        "waits": waits,
        "answer": answer,
        "stop": ids("<|im_start|>") + eos,
        "eos": eos,
        "wait": ids("Wait"),
        "final": ids("\n<|im_start|>answer\nFinal Answer:"),
        "batch_size": count,
    }
    lengths: dict[str, int] = {}

    def measure(player: Contender) -> float:
        answer = player.do("force", **words)
        lengths[player.name] = sum(answer.result)
        return answer.seconds

    with contenders(arena.pythons) as players:
        versions = {player.name: _load(player, arena.model, "float32") for player in players}
        seconds = _turns(players, measure, max(1, arena.rounds - 1))
    settings = {"prompts": count, "thinking budget": thinking, "waits": waits, "answer tokens": answer}
    case = f"{count} prompts, budget {thinking}, {waits} Waits, float32"
    yield Comparison("forced", case, 2.5, seconds, settings, versions, {"new tokens": lengths})


def small(arena: Arena) -> Iterator[Comparison]:
    """Seconds of one decode step of a model of 20 million parameters, where overhead rules."""
    with tempfile.TemporaryDirectory() as directory, contenders(arena.without_vllm()) as players:
        model = _small_model(Path(directory), arena)
        versions = {player.name: _load(player, model, "float32") for player in players}
        prompt = (np.arange(_PROMPT) % 250).tolist()
        yield _decode_steps(players, [prompt], arena.rounds, "20 M parameters, batch 1", 10, versions, "small")


def training(arena: Arena) -> Iterator[Comparison]:
    """Seconds of one pass over the same real tokens, packed by this project, padded to the longest by the peer."""
    tokenizer = AutoTokenizer.from_pretrained(arena.model)
    gsm8k = [len(ids) for ids in tokenizer([f"{text}\n" * 2 for text in arena.texts(64)]).input_ids]
    sigma = 0.45
    drawn = np.random.default_rng(0).lognormal(np.log(4900 / 16) - sigma**2 / 2, sigma, 32)
    s1k = np.clip(drawn, 64, 9100 // 16).astype(int).tolist()
    cases = {
        "GSM8K lengths, batches of 8 padded to the longest": (gsm8k, 8, 1.3),
        "s1K-like lengths, one example at a time": (s1k, 1, 1.1),
    }
    with tempfile.TemporaryDirectory() as directory, contenders(arena.without_vllm()) as players:
        model = _small_model(Path(directory), arena)
        versions = {player.name: _load(player, model, "float32", "load_for_training") for player in players}
        rng = np.random.default_rng(1)
        for case, (lengths, microbatch, goal) in cases.items():
            examples = [rng.integers(0, 250, length).tolist() for length in lengths]
            losses: dict[str, float] = {}

            def measure(
                player: Contender,
                examples: list[list[int]] = examples,
                microbatch: int = microbatch,
                losses: dict[str, float] = losses,
            ) -> float:
                answer = player.do("train", examples=examples, batch_size=8, microbatch_size=microbatch)
                losses[player.name] = answer.result
                return answer.seconds

            seconds = _turns(players, measure, arena.rounds)
            settings = {"parameters": "20 M", "examples": len(lengths), "tokens": sum(lengths), "examples a step": 8}
            yield Comparison("training", case, goal, seconds, settings, versions, {"last loss": losses})


def start(arena: Arena) -> Iterator[Comparison]:
    """Loading the model, and the first token after the start of a process with a warm compilation cache."""
    prompt = AutoTokenizer.from_pretrained(arena.model)(arena.texts(1)[0]).input_ids
    loads: dict[str, list[float]] = {name: [] for name in arena.without_vllm()}
    peaks: dict[str, int] = {}
    versions: dict[str, dict[str, Any]] = {}

    def measure(name: str) -> float:
        with contenders({name: arena.pythons[name]}) as (player,):
            # Started before its process answers: imports count.
            began = time.perf_counter()
            answer = player.do("load", model=str(arena.model), dtype="float32", threads=THREADS)
            versions[name] = answer.result
            player.do("generate", prompts=[prompt], new_tokens=1)
            loads[name].append(answer.seconds)
            peaks[name] = answer.peak_bytes
            return time.perf_counter() - began

    seconds = take_turns(loads, measure, arena.rounds)
    loading = {name: values[1:] for name, values in loads.items()}
    settings = {"dtype": "float32", "prompt tokens": len(prompt)}
    yield Comparison("start", "load the weights", 1.0, loading, settings, versions, {"peak bytes": peaks})
    yield Comparison("start", "first token after process start", 1.0, seconds, settings, versions)


def _small_model(directory: Path, arena: Arena) -> Path:
    """A model of random weights, and a tokenizer made of the questions."""
    tokenizer = build_tokenizer(directory, arena.texts(200), vocab_size=512)
    model = Qwen(QwenConfig.from_hf({**_SMALL, "vocab_size": len(tokenizer)}), dtype=jnp.float32)
    # In bfloat16, as checkpoints are.
    export_model(directory / "model", model, model.init(jax.random.key(0)), dtype=jnp.bfloat16)
    tokenizer.save_pretrained(directory / "model")
    return directory / "model"


SUITES: dict[str, Callable[[Arena], Iterator[Comparison]]] = {
    "decode-float32": partial(decode, "float32", {1: 1.1, 8: 1.5, 32: 1.5}),
    "decode-bfloat16": partial(decode, "bfloat16", {1: 1.0, 8: 1.0, 32: 1.2}),
    "forced": forced,
    "small": small,
    "training": training,
    "start": start,
}
"""By name, in the order in which `all` runs them."""
