"""Generation from Python: `from s1jax import ThinkingBudget, generate, load`."""

from collections.abc import Sequence
from typing import Literal

from s1jax.config import CacheDtype, DecodingMeshSection, ModelSection
from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.engine import Engine
from s1jax.decoding.profiles import DelimiterProfile, load_profile, prepare_prompt, profile_of_model
from s1jax.decoding.requests import Messages, Request, encode_prompt
from s1jax.decoding.results import Finished, Generation
from s1jax.decoding.sampling import GREEDY, Sampling
from s1jax.decoding.setup import check_requests, rows_of
from s1jax.model.load import LoadedModel, load_model

DEFAULT_BUDGET = ThinkingBudget(max_thinking_tokens="auto", max_answer_tokens=1024)


def load(
    model: ModelSection | str, mesh: DecodingMeshSection | None = None, cache_dtype: CacheDtype | None = None
) -> LoadedModel:
    """Read a model from a directory or hub id onto this process's devices, in bfloat16 unless the section says else.

    `cache_dtype` is that of keys and values while it decodes, None: that of the computation.

    Raises FileNotFoundError, UnsupportedConfigError, CheckpointError or MeshError.
    """
    section = ModelSection(path=model) if isinstance(model, str) else model
    return load_model(section, mesh or DecodingMeshSection(), cache_dtype)


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str | Messages | list[int]],
    budget: ThinkingBudget | Sequence[ThinkingBudget] = DEFAULT_BUDGET,
    *,
    profile: str | DelimiterProfile = "s1",
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    chat_template: bool = True,
    logprobs: bool = False,
) -> list[Generation]:
    """Generate for each prompt (a question, chat messages, or token ids), with one budget for all or one for each.

    Results are in the order of the prompts, of which `batch_size` are decoded at once. Raises ValueError with every
    prompt that cannot be run, or the first that cannot be rendered or tokenised.
    """
    budgets = [budget] * len(prompts) if isinstance(budget, ThinkingBudget) else list(budget)
    if len(budgets) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(budgets)} budgets")
    tokenizer = loaded.tokenizer
    delimiters = load_profile(profile) if isinstance(profile, str) else profile
    ids = profile_of_model(delimiters, tokenizer, loaded.directory, loaded.model.config.vocab_size)
    requests = []
    for index, (prompt, own) in enumerate(zip(prompts, budgets, strict=True)):
        try:
            encoded = encode_prompt(prompt, tokenizer, chat_template)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None
        prepared = prepare_prompt(encoded.input_ids, ids, encoded.after_user)
        requests.append(Request(prepared, own, index, sampling=sampling, seed=seed))
    named = [(f"prompt {request.index}", request) for request in requests]
    check_requests(named, ids, loaded.model.config.max_position_embeddings)
    rows = rows_of(batch_size, loaded.mesh, len(requests))
    engine = Engine(loaded, tokenizer, ids, batch_size=rows, logprobs=logprobs)
    events = engine.run(requests)
    results = {event.request.index: event.generation for event in events if isinstance(event, Finished)}
    return [results[index] for index in range(len(prompts))]
