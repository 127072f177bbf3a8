"""python decode.py generate: from a configuration to a file of results, or to the terminal."""

import sys
from dataclasses import asdict
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from s1jax.config import GenerateConfig
from s1jax.config_reader import ConfigError
from s1jax.decoding.generate import Finished, Generator, Request
from s1jax.decoding.profiles import ProfileIds, prepare_prompt
from s1jax.decoding.requests import Prompt, encode_prompt, read_prompts, thinking_budget
from s1jax.decoding.setup import Setup, build_generator, check_requests, prepare
from s1jax.decoding.terminal import TerminalWriter
from s1jax.jsonl import InputError, RowWriter, merge_parts, written_rows
from s1jax.locks import exclusive_file
from s1jax.paths import AnyPath, any_path
from s1jax.resume import keep_settings

_FREE_TO_CHANGE = ("output", "batch_size", "mesh", "plan", "prompts")
"""Keys that a run may be resumed with other values of: the results do not depend on them."""


def generate(config: GenerateConfig) -> None:
    """Generate for all prompts; results are appended to `config.output` as they finish.

    Everything is checked before the weights are read. Raises ConfigError, InputError, ValueError, OSError, InUseError
    or OutOfMemoryError with a message for the person who started the run.
    """
    if (config.prompts is None) == (config.prompt is None):
        raise ConfigError("give either prompts (a JSONL file) or prompt (one question)")
    setup = prepare(config)
    prompts = _prompts(config, setup.tokenizer, setup.profile)
    requests = [
        Request(prepare_prompt(prompt.input_ids, setup.profile), prompt.budget, index, sample)
        for index, prompt in enumerate(prompts)
        for sample in range(config.sampling.num_samples)
    ]
    named = [(f"prompt {prompts[request.index].id!r}", request) for request in requests if request.sample == 0]
    check_requests(named, setup.profile, setup.context_length)
    if config.output is None:
        generator = _generator(config, setup, requests)
        writer = TerminalWriter(setup.tokenizer, requests, sys.stdout)
        for event in generator.run(requests):
            writer.take(event)
        return
    output = any_path(config.output)
    with exclusive_file(output) as lock:
        done = _resume(output, config, prompts)
        missing = [r for r in requests if (r.index, r.sample) not in done]
        if missing:
            generator = _generator(config, setup, missing)
            with RowWriter(output, lock=lock) as file, tqdm(total=len(missing), disable=None) as bar:
                for event in generator.run(missing):
                    if isinstance(event, Finished):
                        file.append([_line(event, prompts[event.request.index], config.sampling.num_samples)])
                        bar.update()
        lock.check()
        place = {repr(prompt.id): index for index, prompt in enumerate(prompts)}
        merge_parts(output, _key, order=lambda row: (place[repr(row["id"])], row.get("sample", 0)))


def _generator(config: GenerateConfig, setup: Setup, requests: list[Request]) -> Generator:
    generator = build_generator(config, setup, logprobs=config.logprobs)
    print(f"{len(requests)} to generate; at most {generator.compilations(requests)} compilations", file=sys.stderr)
    return generator


def _key(row: dict[str, Any]) -> tuple[str, int]:
    """By which a line of the output file is known."""
    return repr(row["id"]), row.get("sample", 0)


def _prompts(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase, profile: ProfileIds) -> list[Prompt]:
    budget = thinking_budget(config.budget, config.max_total_tokens)
    if config.prompts is not None:
        return read_prompts(any_path(config.prompts), tokenizer, profile, budget, chat_template=config.chat_template)
    assert config.prompt is not None
    if not config.prompt.strip():
        raise ConfigError("prompt: is empty")
    return [Prompt(0, config.prompt, encode_prompt(config.prompt, tokenizer, config.chat_template), budget)]


def _line(event: Finished, prompt: Prompt, num_samples: int) -> dict[str, Any]:
    """A result as a line of the output file."""
    line = {"id": prompt.id, "prompt": prompt.given, **asdict(event.generation)}
    if num_samples > 1:
        line["sample"] = event.request.sample
    if line["logprobs"] is None:
        del line["logprobs"]
    return line


def _resume(output: AnyPath, config: GenerateConfig, prompts: list[Prompt]) -> set[tuple[int, int]]:
    """(prompt, sample) of the lines that are there; refuses those of a run with other settings."""
    keep_settings(config, _FREE_TO_CHANGE, output, output.with_name(output.name + ".config.json"))
    index_of = {repr(prompt.id): index for index, prompt in enumerate(prompts)}
    done = set()
    for row in written_rows(output):
        index = index_of.get(repr(row.get("id")))
        if index is None or prompts[index].given != row.get("prompt"):
            raise InputError(f"{output}: it has id {row.get('id')!r}, which is not that prompt's here: move it away")
        done.add((index, row.get("sample", 0)))
    return done
