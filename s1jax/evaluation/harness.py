"""This project's models in lm-evaluation-harness, thinking budgets included: python -m s1jax.evaluation.harness ...

The command takes what `lm_eval` takes, and knows `--model s1jax` beside the harness's own models. Importing this
module registers it. Needs the extra `lm-eval`.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from s1jax.chat_template import render_chat
from s1jax.command import errors_end_all
from s1jax.compilation_cache import keep_compilations
from s1jax.config import CacheSection, DecodingMeshSection, ModelSection
from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.engine import Engine
from s1jax.decoding.profiles import load_profile, prepare_prompt, profile_of_model
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished
from s1jax.decoding.sampling import Sampling
from s1jax.decoding.score import score_rows
from s1jax.decoding.setup import say_rounding
from s1jax.model.load import load_model
from s1jax.processes import same_everywhere, start_processes
from s1jax.tokenizer import encode

_MAX_ANSWER_TOKENS = 1024
"""Of what `max_gen_toks` allows, at most so many tokens are kept for the answer after the thinking."""
_BUDGET_ARGUMENTS = ("max_tokens_thinking", "thinking_n_ignore", "thinking_n_ignore_str")
"""s1's names among gen_kwargs."""


@register_model("s1jax")
class S1jaxLM(TemplateLM):
    """A Qwen model, run by s1jax.

    A request whose gen_kwargs have one of `max_tokens_thinking` (a number, or auto: what `max_gen_toks` and the
    context leave), `thinking_n_ignore` and `thinking_n_ignore_str` thinks before it answers, within that budget, and
    its result is the answer alone; `until` ends the answer. Every other request is generated as it stands.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "bfloat16",
        weights: str | None = None,
        adapter: str | None = None,
        cache_dtype: str | None = None,
        profile: str = "s1",
        batch_size: int | str = 8,
        max_length: int | None = None,
        seed: int = 0,
        fsdp: int | None = None,
        tensor: int | None = None,
        coordinator: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """Read the model.

        Args:
            pretrained: model directory or hub id.
            dtype: of the computation; s1 evaluated in float32, in which batches do not change greedy results.
            weights: int8 or int4 to quantise them while they are read, as `model.weights`.
            adapter: directory or hub id of an adapter to merge into the model, as `model.adapter`.
            cache_dtype: int8 for keys and values of few bits, as `cache.dtype`.
            profile: delimiters of thinking requests, as `budget.profile`.
            batch_size: rows computed at once.
            max_length: prompt and output together, in tokens; None: the model's context.
            seed: of all draws, where a request's own gen_kwargs have none.
            fsdp: shards of parameters and rows, as `mesh.fsdp`; None: chosen.
            tensor: shards of heads and feed-forward, as `mesh.tensor`; None: chosen.
            coordinator: where several processes have one model and no launcher tells, as `mesh.coordinator`.
            num_processes: likewise, as `mesh.num_processes`.
            process_id: likewise, as `mesh.process_id`.
            device: not used, jax chooses (JAX_PLATFORMS); the harness always gives one.
            max_batch_size: must be None: batch sizes are not searched for.

        Raises ValueError, OSError or a subclass for a model, profile or mesh that cannot be used.
        """
        super().__init__()
        if max_batch_size is not None or not str(batch_size).isdecimal():
            raise ValueError("s1jax needs a --batch_size that is a number, and no --max_batch_size")
        # Words of a command line: the sections check them.
        section = ModelSection(path=pretrained, dtype=dtype, weights=weights, adapter=adapter)  # type: ignore[arg-type]
        cache = CacheSection(dtype=cache_dtype)  # type: ignore[arg-type]
        delimiters = load_profile(profile)
        mesh = DecodingMeshSection(
            fsdp=fsdp, tensor=tensor, coordinator=coordinator, num_processes=num_processes, process_id=process_id
        )
        processes = start_processes(mesh)
        if processes.count > 1:
            # All ask the model for the same, as rank 0 of 1; by this the harness knows which one prints and writes.
            os.environ["LOCAL_RANK"] = str(processes.index)
        if processes.index == 0:
            say_rounding(section.dtype, "dtype=float32")
        self._loaded = load_model(section, mesh, cache.dtype)
        self.tokenizer, config = self._loaded.tokenizer, self._loaded.model.config
        # What ends a text is the model's own where it does not think, too.
        plain = replace(load_profile("none"), eos=delimiters.eos)
        self._profiles = {
            thinks: profile_of_model(own, self.tokenizer, self._loaded.directory, config.vocab_size)
            for thinks, own in ((False, plain), (True, delimiters))
        }
        self._batch_size, self._seed = int(batch_size), seed
        self._max_length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text, which also stands before one that is scored without a context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps caches of templated requests under."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; Qwen's tokenizers put none around it."""
        return encode(string, self.tokenizer, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the text of a prompt, or, without a generation prompt, to be continued in the last one."""
        return render_chat(
            chat_history,
            self.tokenizer,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation; of what is too long, the context is cut in front."""
        same_everywhere({"requests": repr(requests)})
        # The model never reads a row's last id, so a row may be one longer than its context.
        rows = [(context + continuation)[-self._max_length - 1 :] for _, context, continuation in requests]
        results = []
        for (key, _, continuation), row in zip(requests, score_rows(self._loaded, rows, self._batch_size), strict=True):
            # The first id of a row that was cut down to its continuation has nothing before it to be scored from.
            scored = slice(max(1, len(row["input_ids"]) - len(continuation)), None)
            result = (sum(row["logprobs"][scored]), all(row["greedy"][scored]))
            results.append(result)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the context where it is longer."""
        pairs: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._max_length, context_len=1
            )
            own = [(None, *make_disjoint_window(window)) for window in windows]
            pairs += own
            counts.append(len(own))
        scores = iter(score for score, _ in self._loglikelihood_tokens(pairs))
        totals = [sum((next(scores) for _ in range(count)), start=0.0) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, or the answer alone where it thinks, up to the first of `until`."""
        # A cache that one process has and another has not would leave them waiting for each other.
        same_everywhere({"requests": repr([instance.args for instance in requests])})
        stops: list[list[str]] = []
        groups: dict[bool, list[Request]] = defaultdict(list)
        """By whether they think: there are two profiles."""
        for index, instance in enumerate(requests):
            context, gen_kwargs = instance.args
            thinks, request, until = self._request(index, context, gen_kwargs)
            groups[thinks].append(request)
            stops.append(until)
        results = [""] * len(requests)
        for thinks, group in groups.items():
            engine = Engine(self._loaded, self.tokenizer, self._profiles[thinks], batch_size=self._batch_size)
            for event in engine.run(group):
                if isinstance(event, Finished):
                    index = event.request.index
                    results[index] = postprocess_generated_text(event.generation.answer, stops[index], None)
                    self.cache_hook.add_partial("generate_until", requests[index].args, results[index])
        return results

    def _request(self, index: int, context: str, gen_kwargs: dict[str, Any]) -> tuple[bool, Request, list[str]]:
        """Whether one context thinks, its request, and the texts that end its answer.

        Raises ValueError for gen_kwargs that are not known, or leave no room for an answer.
        """
        arguments = dict(normalize_gen_kwargs(gen_kwargs))
        thinking = {name: arguments.pop(name) for name in _BUDGET_ARGUMENTS if name in arguments}
        until, total = arguments.pop("until"), arguments.pop("max_gen_toks")
        if not arguments.pop("do_sample"):
            arguments["temperature"] = 0.0
        seed = int(arguments.pop("seed", self._seed))
        try:
            sampling = Sampling(**arguments)
        except TypeError:
            known = ["until", "max_gen_toks", "do_sample", "seed", *Sampling.__annotations__, *_BUDGET_ARGUMENTS]
            raise ValueError(f"gen_kwargs: {sorted(arguments)}: known are {', '.join(known)}") from None
        profile = self._profiles[bool(thinking)]
        # A thinking prompt may still get its start delimiter.
        prompt_ids, total = maybe_truncate(
            self.tok_encode(context), total, self._max_length - len(profile.start), shrink_gen_toks=True
        )
        prompt = prepare_prompt(prompt_ids, profile)
        if thinking:
            budget = _thinking_budget(thinking, total, len(profile.budget_end_with_newline))
        else:
            budget = ThinkingBudget(max_answer_tokens=total)
        budget = replace(budget, max_total_tokens=len(prompt.prompt_ids) + total)
        return bool(thinking), Request(prompt, budget, index, sampling=sampling, seed=seed), until


def _thinking_budget(arguments: dict[str, Any], total: int, ending: int) -> ThinkingBudget:
    """A budget from s1's arguments, where thinking, what ends it (of so many tokens) and answer have `total` tokens.

    Raises ValueError where that leaves no answer.
    """
    limit = arguments.get("max_tokens_thinking", "auto")
    limit = limit if limit == "auto" else int(limit)
    room = (total - ending) // 2 if limit == "auto" else total - ending - limit
    if room < 1:
        raise ValueError(f"gen_kwargs: max_gen_toks ({total}) leaves no answer after max_tokens_thinking ({limit})")
    return ThinkingBudget(
        max_thinking_tokens=limit,
        num_ignore=int(arguments.get("thinking_n_ignore", 0)),
        wait=str(arguments.get("thinking_n_ignore_str", "Wait")),
        max_answer_tokens=min(_MAX_ANSWER_TOKENS, room),
    )


if __name__ == "__main__":
    keep_compilations()
    with errors_end_all():
        cli_evaluate()
