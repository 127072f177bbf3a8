"""python decode.py generate: from a configuration to a file of results, or to the terminal."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from s1jax.config import GenerateConfig
from s1jax.config_reader import ConfigError
from s1jax.decoding.engine import Engine
from s1jax.decoding.hosts import Hosts, Row, SharedOutput, same_command, start_hosts
from s1jax.decoding.profiles import ProfileIds, prepare_prompt
from s1jax.decoding.requests import Prompt, Request, encode_prompt, read_prompts, thinking_budget
from s1jax.decoding.results import Finished
from s1jax.decoding.setup import Setup, build_engine, check_requests, prepare
from s1jax.decoding.terminal import TerminalWriter
from s1jax.jsonl import InputError
from s1jax.model.fingerprint import model_fingerprint
from s1jax.paths import any_path
from s1jax.processes import together
from s1jax.progress import progress
from s1jax.resume import keep_settings, settings_of

_FREE_TO_CHANGE = ("output", "batch_size", "cache", "mesh", "plan", "prompts")
"""Keys that a run may be resumed with other values of: the results do not depend on them, but for the cache's dtype."""


def generate(config: GenerateConfig) -> None:
    """Generate for all prompts; results are appended to `config.output` as they finish.

    Everything is checked before the weights are read. Raises ConfigError, InputError, ValueError, OSError, InUseError
    or OutOfMemoryError with a message for the person who started the run.
    """
    if (config.prompts is None) == (config.prompt is None):
        raise ConfigError("give either prompts (a JSONL file) or prompt (one question)")
    hosts = start_hosts(config.mesh)
    if hosts.copies and config.output is None:
        raise ConfigError("mesh.copies: give an output, in which the results of all processes come together")
    setup, prompts, requests = together(lambda: _read(config))
    same_command(config, hosts, requests)
    if config.output is None:
        writer = TerminalWriter(setup.tokenizer, requests, sys.stdout)
        for event in _engine(config, setup, hosts, requests).run(requests):
            if hosts.writes:
                writer.take(event)
        return
    index_of = {repr(prompt.id): index for index, prompt in enumerate(prompts)}

    def key(row: Row) -> tuple[int, int]:
        return index_of[repr(row["id"])], row.get("sample", 0)

    with SharedOutput(any_path(config.output), hosts) as output:

        def resume() -> list[tuple[int, int]]:
            """What is done; refuses an output of a run with other settings or prompts."""
            beside = output.path.with_name(output.path.name + ".config.json")
            settings = settings_of(config, _FREE_TO_CHANGE, model_fingerprint(config.model))
            settings["cache.dtype"] = config.cache.dtype
            keep_settings(settings, output.path, beside, save=hosts.processes.index == 0)
            asked = {request.index: _asked(prompts[request.index], request) for request in requests}
            rows = output.rows()
            for row in rows:
                index = index_of.get(repr(row.get("id")))
                if index is None or any(row.get(name) != value for name, value in asked[index].items()):
                    raise InputError(
                        f"{output.path}: it has id {row.get('id')!r}, whose prompt or budget is not that one here: "
                        "move it away"
                    )
            return [key(row) for row in rows]

        done = {(index, sample) for index, sample in hosts.told(resume)}
        missing = [
            request
            for number, request in enumerate(requests)
            if hosts.deals(number) and (request.index, request.sample) not in done
        ]
        if missing:
            engine = _engine(config, setup, hosts, missing)
            with progress("answer", len(missing), shown=hosts.writes) as bar:
                for event in engine.run(missing):
                    if isinstance(event, Finished):
                        output.append([_line(event, prompts[event.request.index], config.sampling.num_samples)])
                    bar.update(isinstance(event, Finished))
        with output.merged(lambda rows: len(requests) - len(set(map(key, rows))), key, order=key):
            pass


def _read(config: GenerateConfig) -> tuple[Setup, list[Prompt], list[Request]]:
    """What is to be generated, checked."""
    setup = prepare(config)
    prompts = _prompts(config, setup.tokenizer, setup.profile)
    requests = [
        Request(
            prepare_prompt(prompt.encoded.input_ids, setup.profile, prompt.encoded.after_user),
            prompt.budget,
            index,
            sample,
            setup.sampling,
            config.sampling.seed,
        )
        for index, prompt in enumerate(prompts)
        for sample in range(config.sampling.num_samples)
    ]
    named = [(f"prompt {prompts[request.index].id!r}", request) for request in requests if request.sample == 0]
    check_requests(named, setup.profile, setup.context_length, config.cache.tokens)
    return setup, prompts, requests


def _engine(config: GenerateConfig, setup: Setup, hosts: Hosts, requests: Sequence[Request]) -> Engine:
    engine = together(lambda: build_engine(config, setup, len(requests), logprobs=config.logprobs))
    if hosts.writes:
        most = engine.compilations(requests)
        print(f"{len(requests)} to generate; at most {most} compilations", file=sys.stderr)
    return engine


def _prompts(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase, profile: ProfileIds) -> list[Prompt]:
    budget = thinking_budget(config.budget, config.max_total_tokens)
    if config.prompts is not None:
        return read_prompts(any_path(config.prompts), tokenizer, profile, budget, chat_template=config.chat_template)
    assert config.prompt is not None
    if not config.prompt.strip():
        raise ConfigError("prompt: is empty")
    try:
        encoded = encode_prompt(config.prompt, tokenizer, config.chat_template)
    except ValueError as error:
        raise ConfigError(f"prompt: {error}") from None
    return [Prompt(0, config.prompt, encoded, budget)]


def _asked(prompt: Prompt, request: Request) -> dict[str, Any]:
    """What a result is the answer to, as a line of the output file has it."""
    asked = {"prompt": prompt.given, "prompt_ids": request.prompt.prompt_ids, "budget": asdict(prompt.budget)}
    as_read: dict[str, Any] = json.loads(json.dumps(asked))
    return as_read


def _line(event: Finished, prompt: Prompt, num_samples: int) -> dict[str, Any]:
    """A result as a line of the output file."""
    line = {"id": prompt.id, **_asked(prompt, event.request), **asdict(event.generation)}
    if num_samples > 1:
        line["sample"] = event.request.sample
    if line["logprobs"] is None:
        del line["logprobs"]
    return line
