"""What every command that generates does first: tokenizer and profile, all checks, and only then the weights."""

import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from s1jax.config import EvaluateConfig, GenerateConfig, SamplerSection, ServeConfig
from s1jax.decoding.engine import STEPS_PER_CHUNK, Engine
from s1jax.decoding.profiles import ProfileIds, load_profile, profile_of_model
from s1jax.decoding.requests import Request, problem_of
from s1jax.decoding.sampling import Sampling
from s1jax.jsonl import LISTED_PROBLEMS, InputError
from s1jax.mesh import batch_shards, divisible_rows
from s1jax.model.config import QwenConfig
from s1jax.model.hf import check_sizes
from s1jax.model.hf_files import resolve_model
from s1jax.model.load import LoadedModel, decoding_model, load_model
from s1jax.tokenizer import load_tokenizer

_ROWS_PER_SHARD = {"cpu": 8}
"""Where it is not 64."""


class Setup(NamedTuple):
    """What is known of a model before its weights are read."""

    tokenizer: PreTrainedTokenizerBase
    profile: ProfileIds
    context_length: int
    sampling: Sampling


def prepare(config: GenerateConfig | EvaluateConfig | ServeConfig) -> Setup:
    """Read tokenizer and configuration of the model.

    Raises ValueError, OSError or a subclass for a model, profile or sampling that cannot be used.
    """
    directory = resolve_model(config.model.path)
    tokenizer = load_tokenizer(directory)
    # Refuses what the section asks of a model that cannot do it.
    model_config = decoding_model(config.model, QwenConfig.from_directory(directory)).config
    check_sizes(directory, model_config)
    delimiters = load_profile(config.budget.profile)
    profile = profile_of_model(delimiters, tokenizer, directory, model_config.vocab_size)
    return Setup(tokenizer, profile, model_config.max_position_embeddings, sampling_of(config.sampling))


def check_requests(
    named: Sequence[tuple[str, Request]], profile: ProfileIds, context_length: int, cache_tokens: int | None = None
) -> None:
    """Raise InputError that lists the requests, by these names, that have a `problem_of`."""
    problems = [
        f"  {name}: {problem}"
        for name, request in named
        if (problem := problem_of(request, profile, context_length, cache_tokens))
    ]
    if problems:
        count = f"{len(problems)} of {len(named)} prompts cannot be run:"
        raise InputError("\n".join([count, *problems[:LISTED_PROBLEMS]]))


def build_engine(
    config: GenerateConfig | EvaluateConfig,
    setup: Setup,
    num_requests: int,
    *,
    logprobs: bool = False,
    share: bool = True,
) -> Engine:
    """Read the weights, and return what generates with them, with rows for so many requests if it chooses them."""
    loaded = load_model(config.model, config.mesh, config.cache.dtype)
    return engine_of(loaded, config, setup, num_requests, logprobs=logprobs, share=share)


def engine_of(
    loaded: LoadedModel,
    config: GenerateConfig | EvaluateConfig | ServeConfig,
    setup: Setup,
    num_requests: int = sys.maxsize,
    *,
    logprobs: bool = False,
    share: bool = True,
    steps_per_chunk: int = STEPS_PER_CHUNK,
) -> Engine:
    """What generates with a model that has been read, as the configuration has it."""
    return Engine(
        loaded,
        setup.tokenizer,
        setup.profile,
        batch_size=rows_of(config.batch_size, loaded.mesh, num_requests),
        cache_tokens=config.cache.tokens,
        logprobs=logprobs,
        share=share,
        steps_per_chunk=steps_per_chunk,
    )


def rows_of(batch_size: int | Literal["auto"], mesh: Mesh, num_requests: int = sys.maxsize) -> int:
    """The rows of a batch on this mesh: as asked for or as many as are worth while, rounded up to what it divides.

    Up to some 64 rows an accelerator's step takes the time of reading the weights, and pages say how many there are at
    work; a CPU's grows with each. Not more than there are requests, as a power of two, so that a few requests more or
    less are no other programs.
    """
    most = batch_shards(mesh) * _ROWS_PER_SHARD.get(mesh.devices.flat[0].platform, 64)
    rows = min(most, _power_of_two(num_requests)) if batch_size == "auto" else batch_size
    return divisible_rows(rows, mesh)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def sampling_of(section: SamplerSection) -> Sampling:
    """The sampler that a configuration asks for. Raises ValueError for one that cannot be."""
    return Sampling(section.temperature, section.top_k, section.top_p, section.min_p)


def say_rounding(dtype: str, key: str) -> None:
    """Say on a line of the error output what an evaluation in less than float32, which `key` sets, means."""
    if dtype != "float32":
        print(
            f"evaluating in {dtype}: batch and mesh change how numbers are rounded, and so, now and then, a greedy "
            f"answer; {key} keeps that from happening, in twice the memory",
            file=sys.stderr,
        )
