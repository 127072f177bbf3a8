"""From the body of a request to what the engine decodes: prompts as ids, budgets, samplers, all checked."""

import secrets
from dataclasses import asdict, dataclass, replace
from typing import Any

from s1jax.config import ServeConfig
from s1jax.decoding.budget import ThinkingBudget, build_tables
from s1jax.decoding.profiles import PreparedPrompt, ProfileIds, prepare_prompt
from s1jax.decoding.requests import Request, encode_prompt, problem_of, thinking_budget
from s1jax.decoding.sampling import Sampling
from s1jax.decoding.setup import Setup, sampling_of
from s1jax.serving.body import AnyBody, ChatBody
from s1jax.serving.budgets import AskedBudget, FieldError, asked_budget


@dataclass(frozen=True)
class Ask:
    """A request of a client, understood."""

    body: AnyBody
    requests: list[Request]
    """One for each choice of the answer, those of one prompt together."""
    exclude: bool
    """Whether the answer is to be without its thinking."""


class Reader:
    """Reads requests as one server's configuration and model have them."""

    def __init__(self, config: ServeConfig, setup: Setup):
        """Raises ValueError for a budget or a sampler that cannot be."""
        self._setup, self._max_samples = setup, config.server.max_samples
        self._efforts = asdict(config.efforts)
        self.longest = min(setup.context_length, config.max_total_tokens or setup.context_length)
        """Tokens of prompt and output together, of any request."""
        self._cache_tokens = config.cache.tokens
        self._budget = thinking_budget(config.budget, self.longest)
        self._sampling = sampling_of(config.sampling)

    def read(self, body: AnyBody, raw: dict[str, Any]) -> Ask:
        """What `raw`, whose fields but for the budget are `body`, asks for.

        Raises FieldError for what cannot be answered. Takes as long as the chat template does.
        """
        asked = asked_budget(raw, self._efforts)
        sampling = self._sampling_of(body)
        seed = secrets.randbits(32) if body.seed is None else body.seed
        given, samples = body.given, body.n or 1
        if len(given) * samples > self._max_samples:
            raise FieldError("n", f"{len(given) * samples} answers, and this server gives at most {self._max_samples}")
        requests = []
        for prompt in given:
            prepared = self._prepared(prompt, chat=isinstance(body, ChatBody))
            budget = self._budget_of(body, asked, prepared)
            # The place of a request among others must not matter to its draws, so all have the same.
            requests += [Request(prepared, budget, 0, sample, sampling, seed) for sample in range(samples)]
        for request in requests[::samples]:
            if problem := problem_of(request, self._setup.profile, self._setup.context_length, self._cache_tokens):
                raise FieldError("messages" if isinstance(body, ChatBody) else "prompt", problem)
        return Ask(body, requests, exclude=bool(asked.exclude))

    def _prepared(self, prompt: Any, *, chat: bool) -> PreparedPrompt:
        field = "messages" if chat else "prompt"
        if not prompt:
            raise FieldError(field, "is empty")
        try:
            encoded = encode_prompt(prompt, self._setup.tokenizer, chat)
        except ValueError as error:
            raise FieldError(field, str(error)) from None
        valid = self._setup.profile.valid
        if outside := [i for i in encoded.input_ids if not 0 <= i < len(valid) or not valid[i]]:
            raise FieldError(field, f"ids {outside[:5]} are not the tokenizer's")
        return prepare_prompt(encoded.input_ids, self._setup.profile, encoded.after_user)

    def _sampling_of(self, body: AnyBody) -> Sampling:
        names = ("temperature", "top_p", "top_k", "min_p")
        own: dict[str, Any] = {name: value for name in names if (value := getattr(body, name)) is not None}
        if own.get("top_k") in (0, -1):
            own["top_k"] = None  # How other servers say "all".
        try:
            return replace(self._sampling, **own)
        except ValueError as error:
            raise FieldError(next(iter(own)), str(error)) from None

    def _budget_of(self, body: AnyBody, asked: AskedBudget, prompt: PreparedPrompt) -> ThinkingBudget:
        """A request's own values, and the server's where it has none.

        `max_tokens` bounds thinking, its end and answer together. If nothing else is said of either, half of it is kept
        for the answer; if the thinking is bounded, the answer has all that is left.
        """
        profile = self._setup.profile
        own: dict[str, Any] = {
            name: value for name, value in asdict(asked).items() if value is not None and name != "exclude"
        }
        most = body.max_completion_tokens or body.max_tokens
        if most is not None:
            own["max_total_tokens"] = min(len(prompt.prompt_ids) + most, self.longest)
            if "max_answer_tokens" not in own:
                bounded = isinstance(own.get("max_thinking_tokens"), int) or not profile.profile.thinks
                own["max_answer_tokens"] = None if bounded else self._kept_for_answer(most)
        try:
            budget = replace(self._budget, **own)
        except ValueError as error:
            raise FieldError("max_answer_tokens", str(error)) from None
        if not profile.profile.thinks and budget.min_thinking_tokens + budget.num_ignore:
            raise FieldError("min_thinking_tokens", f"the profile {profile.profile.name} does not think")
        if "wait" in own:
            try:
                build_tables(profile, [budget], self._setup.tokenizer)
            except ValueError as error:
                raise FieldError("wait", str(error)) from None
        return budget

    def _kept_for_answer(self, most: int) -> int:
        half = max(1, (most - _longest_ending(self._setup.profile)) // 2)
        return half if self._budget.max_answer_tokens is None else min(half, self._budget.max_answer_tokens)


def _longest_ending(profile: ProfileIds) -> int:
    """The tokens that a forced end of the thinking takes at most."""
    return max(len(profile.budget_end), len(profile.budget_end_with_newline))
