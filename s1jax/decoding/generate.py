"""The host's half of decoding: prompts wait, rows take their places in the batch, results leave as they finish."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError
from transformers import PreTrainedTokenizerBase

from s1jax.decoding.budget import (
    Phase,
    RowParams,
    RowState,
    ThinkingBudget,
    ThinkingEnd,
    build_tables,
    resolve_max_thinking_tokens,
    start_rows,
)
from s1jax.decoding.finite import NonFiniteError
from s1jax.decoding.forks import Fork, Rules, WaitTexts, fork
from s1jax.decoding.hosts import to_host
from s1jax.decoding.loop import Chunk, Rows, Shared, decode_chunk, empty_cache, grow_cache, insert, prefill
from s1jax.decoding.profiles import PreparedPrompt, ProfileIds
from s1jax.decoding.results import Generation, generation_of, under
from s1jax.decoding.sampling import Sampling, request_key
from s1jax.mesh import batch_shards
from s1jax.model.load import LoadedModel
from s1jax.model.qwen import KVCache

STEPS_PER_CHUNK = 32
"""Decode steps between two looks of the host at the rows."""
_SHORTEST_PROMPT, _SHORTEST_CACHE = 64, 128


class OutOfMemoryError(RuntimeError):
    """The device could not hold the batch; the message says what was tried and what to lower."""


@dataclass(frozen=True)
class Request:
    """One sample to generate: a prompt with its start delimiter, its budget, and what its randomness comes from."""

    prompt: PreparedPrompt
    budget: ThinkingBudget
    index: int
    """Of the prompt in its run, from 0; with `sample` and the seed it determines every draw."""
    sample: int = 0


@dataclass(frozen=True)
class Progress:
    """New tokens of a request that is not finished."""

    request: Request
    output_ids: list[int]
    forced: list[bool]


@dataclass(frozen=True)
class Finished:
    """A request's result."""

    request: Request
    generation: Generation
    num_decoded_tokens: int
    """Output tokens that were decoded for it; the others it shares with a request that was decoded before."""


def problem_of(request: Request, profile: ProfileIds, context: int) -> str | None:
    """Why a request cannot be run by a model of this context length: no prompt, or no room to answer."""
    if not request.prompt.prompt_ids:
        return "the prompt is empty"
    try:
        resolve_max_thinking_tokens(request.budget, request.prompt, profile, context)
    except ValueError as error:
        return str(error)
    return None


class _Slot:
    """A row of the batch while a request occupies it."""

    def __init__(self, request: Request, start: Rows):
        self.request = request
        self.start = start
        """The row before its first step."""
        self.output_ids: list[int] = []
        self.forced: list[bool] = []
        self.logprobs: list[float] = []
        self.attempts: list[int] = []
        """Steps at which an end of the thinking was drawn."""
        self.num_shared_tokens = 0

    def take(self, chunk: Chunk, row: int) -> Progress:
        """Keep what a chunk wrote in this row."""
        written = chunk.written[:, row]
        self.attempts += (len(self.output_ids) + np.flatnonzero(chunk.attempts[written, row])).tolist()
        new_ids = chunk.tokens[written, row].tolist()
        new_forced = chunk.forced[written, row].tolist()
        self.output_ids += new_ids
        self.forced += new_forced
        self.logprobs += chunk.logprobs[written, row].tolist()
        return Progress(self.request, new_ids, new_forced)

    def continue_from(self, done: "_Slot", at: Fork, ends_in_newline: np.ndarray) -> None:
        """Begin at the step at which this request parts from another, whose keys and values are in the row's cache."""
        self.num_shared_tokens = at.step
        self.output_ids, self.forced = done.output_ids[: at.step], done.forced[: at.step]
        self.logprobs = done.logprobs[: at.step]
        self.attempts = [step for step in done.attempts if step < at.step]
        state = self.start.state
        state.length[0] += at.step
        state.num_thinking_tokens[0] += at.step
        state.num_waits[0] = at.num_waits
        if at.step > 0:
            # What is forced while thinking is a wait text, and runs part only after its last token.
            state.mask_end[0] = self.forced[-1]
            state.ends_in_newline[0] = ends_in_newline[self.output_ids[-1]]
            self.start.last_token[0] = self.output_ids[-1]


class Generator:
    """Generates for any number of requests, `batch_size` at a time."""

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        profile: ProfileIds,
        sampling: Sampling,
        *,
        seed: int = 0,
        batch_size: int = 8,
        logprobs: bool = False,
        share: bool = True,
    ):
        """Settings of a run; `batch_size` is rounded up to what the mesh divides.

        With `share`, requests of one prompt, index and sample whose budgets answer alike follow each other in one row,
        and each decodes only what it does not have in common with the one before. Results are those of each alone.
        """
        self._loaded, self._tokenizer, self._profile = loaded, tokenizer, profile
        self._sampling, self._seed, self._logprobs = sampling, seed, logprobs
        self._share = share
        self._batch = batch_size + -batch_size % batch_shards(loaded.mesh)
        self._context = loaded.model.config.max_position_embeddings
        self._slots = 0
        """Of the cache that was last asked for."""

    def compilations(self, requests: Sequence[Request]) -> int:
        """At most how many programs these requests need: prompt buckets, cache buckets, and moves between them."""
        prompts = {self._padded_length(r.prompt.prompt_ids) for r in requests}
        longest = max(self._limit(r) for r in requests)
        caches = {bucket(n, self._context) for n in range(min(prompts), bucket(longest, self._context) + 1)}
        # A prefill for each prompt bucket; for each cache bucket its decode loop, insertions, and a way to get there:
        # the first is made empty, the others grow from one before.
        return len(prompts) + len(caches) * (2 + len(prompts))

    def _limit(self, request: Request) -> int:
        """The longest that a request's context can get, in tokens."""
        budget, prompt = request.budget, len(request.prompt.prompt_ids)
        limit = min(self._context, budget.max_total_tokens or self._context)
        if budget.max_answer_tokens is None:
            return limit
        thinking, _ = resolve_max_thinking_tokens(budget, request.prompt, self._profile, self._context)
        return min(limit, prompt + thinking + len(self._profile.budget_end_with_newline) + budget.max_answer_tokens)

    def run(self, requests: Iterable[Request]) -> Iterator[Progress | Finished]:
        """Generate, yielding what each chunk wrote and each result as soon as it is there, in no fixed order.

        Raises ValueError for requests that have a `problem_of`, OutOfMemoryError if the device is full, NonFiniteError
        if the model's scores are no numbers to draw from.
        """
        requests = list(requests)
        waiting = deque(self._sharing(requests))
        slots: list[_Slot | None] = [None] * self._batch
        following: list[list[_Slot]] = [[] for _ in slots]
        """Of each row, what goes on with the beginning of the request that is there."""
        cache: KVCache | None = None
        try:
            # Under the mesh, arrays that are made are on all its devices, those of other processes too.
            with jax.set_mesh(self._loaded.mesh):
                tables, wait_starts = build_tables(self._profile, [r.budget for r in requests], self._tokenizer)
                shared = Shared(
                    tables, jnp.asarray(self._profile.valid), jnp.asarray(self._profile.end_tokens or (0,), jnp.int32)
                )
                rows = self._start([], wait_starts)
                texts = WaitTexts(np.asarray(tables.text_ids), np.asarray(tables.text_lengths))
                while waiting or any(slots):
                    for row in range(self._batch):
                        if slots[row] is None and waiting:
                            first, *following[row] = [
                                _Slot(request, self._start([request], wait_starts)) for request in waiting.popleft()
                            ]
                            slots[row] = first
                            _set_row(rows, row, first.start)
                            cache = self._admit(cache, row, first.request)
                    assert cache is not None
                    cache = self._with_room(cache, rows)
                    cache, state, last_token, chunk = decode_chunk(
                        self._loaded.model,
                        self._sampling,
                        STEPS_PER_CHUNK,
                        self._logprobs,
                        self._loaded.params,
                        shared,
                        cache,
                        rows,
                    )
                    state, last_token, chunk = to_host((state, last_token, chunk))
                    # Copies: arrays that come from a device cannot be written to.
                    rows = rows._replace(state=jax.tree.map(np.array, state), last_token=np.array(last_token))
                    for row, slot in enumerate(slots):
                        if slot is None:
                            continue
                        if not (finite := chunk.finite[:, row] | ~chunk.written[:, row]).all():
                            raise self._nonfinite(slot, chunk.tokens[: np.argmin(finite), row])
                        yield slot.take(chunk, row)
                        if state.phase[row] == Phase.DONE:
                            result = self._result(slot, RowState(*(values[row] for values in state)))
                            yield Finished(slot.request, result, len(slot.output_ids) - slot.num_shared_tokens)
                            forks = [(other, self._fork(slot, other, texts)) for other in following[row]]
                            for same in (other for other, at in forks if at is None):
                                reached = ThinkingEnd(_one(same.start.params).max_thinking_end)
                                yield Finished(same.request, under(result, reached), 0)
                            slots[row], following[row] = self._next(slot, forks)
                            if continued := slots[row]:
                                _set_row(rows, row, continued.start)
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            layers = self._loaded.model.config.num_hidden_layers
            raise OutOfMemoryError(
                f"out of device memory with {self._batch} rows x {self._slots} cache slots in {layers} layers: "
                "lower batch_size, budget.max_thinking_tokens or max_total_tokens, or raise mesh.tensor"
            ) from error

    def _sharing(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Lists of requests with the same draws that answer alike, those that think longest first."""
        if not self._share:
            return [[request] for request in requests]
        found: dict[Any, list[Request]] = {}
        for r in requests:
            answers = (r.budget.max_answer_tokens, r.budget.max_total_tokens)
            found.setdefault((r.index, r.sample, tuple(r.prompt.prompt_ids), *answers), []).append(r)

        def longest_first(request: Request) -> tuple[int, int]:
            thinking, _ = resolve_max_thinking_tokens(request.budget, request.prompt, self._profile, self._context)
            return -request.budget.num_ignore, -thinking

        return [sorted(alike, key=longest_first) for alike in found.values()]

    def _fork(self, done: _Slot, other: _Slot, texts: WaitTexts) -> Fork | None:
        """Where a request parts from one that has finished; None if it does not."""
        if not self._profile.profile.thinks:
            return None
        before, after = (Rules(_one(slot.start.params), texts) for slot in (done, other))
        in_prompt = done.request.prompt.num_thinking_tokens
        return fork(before, after, done.attempts, len(done.output_ids), in_prompt)

    def _next(self, done: _Slot, forks: Sequence[tuple[_Slot, Fork | None]]) -> tuple[_Slot | None, list[_Slot]]:
        """The request that has most in common with the one whose keys and values are in the row, and the others."""
        left = [(slot, at) for slot, at in forks if at is not None]
        if not left:
            return None, []
        slot, at = max(left, key=lambda item: item[1].step)
        slot.continue_from(done, at, self._profile.ends_in_newline)
        return slot, [other for other, _ in left if other is not slot]

    def _result(self, slot: _Slot, state: RowState) -> Generation:
        logprobs = slot.logprobs if self._logprobs else None
        return generation_of(
            slot.request.prompt, slot.output_ids, slot.forced, logprobs, state, self._profile, self._tokenizer
        )

    def _nonfinite(self, slot: _Slot, new_ids: np.ndarray) -> NonFiniteError:
        """What to raise of a row whose scores were not finite after these ids of a chunk."""
        request = slot.request
        input_ids = [*request.prompt.prompt_ids, *slot.output_ids, *new_ids.tolist()]
        text = f"prompt {request.index}, sample {request.sample}, after {len(input_ids)} tokens"
        return NonFiniteError(text, self._loaded, input_ids)

    def _start(self, requests: Sequence[Request], wait_starts: dict[tuple[str, ...], int]) -> Rows:
        """The rows of these requests before their first step, and finished ones up to the batch's size."""
        params, state = start_rows(
            [r.budget for r in requests],
            [r.prompt for r in requests],
            self._profile,
            wait_starts,
            self._context,
            self._batch,
        )
        # A row without a request has a context of one padding token, so that its position is in the cache.
        state.length[len(requests) :] = 1
        rows = Rows(state, params, np.zeros(self._batch, np.int32), np.zeros((self._batch, 2), np.uint32))
        for row, request in enumerate(requests):
            rows.last_token[row] = request.prompt.prompt_ids[-1]
            rows.key_data[row] = jax.random.key_data(request_key(self._seed, request.index, request.sample))
        return rows

    def _admit(self, cache: KVCache | None, row: int, request: Request) -> KVCache:
        prompt_ids = request.prompt.prompt_ids
        padded = np.zeros(self._padded_length(prompt_ids), np.int32)
        padded[: len(prompt_ids)] = prompt_ids
        cache = self._with_slots(cache, bucket(len(padded), self._context))
        prompt = prefill(self._loaded.model, self._loaded.params, padded)
        return insert(cache, prompt, np.int32(row))

    def _padded_length(self, prompt_ids: Sequence[int]) -> int:
        return bucket(len(prompt_ids), self._context, shortest=_SHORTEST_PROMPT)

    def _with_slots(self, cache: KVCache | None, slots: int) -> KVCache:
        """The cache with at least so many slots: a new one, or grown, or as it is."""
        if cache is not None and cache[0].keys.shape[2] >= slots:
            return cache
        self._slots = slots
        return empty_cache(self._loaded.model, self._batch, slots) if cache is None else grow_cache(cache, slots)

    def _with_room(self, cache: KVCache, rows: Rows) -> KVCache:
        """The cache, grown if one of the rows at work could outgrow it within a chunk."""
        active = rows.state.phase != Phase.DONE
        needed = np.where(active, np.minimum(rows.state.length + STEPS_PER_CHUNK, rows.params.max_total_tokens), 1)
        return self._with_slots(cache, bucket(int(needed.max()), self._context))


def _one(params: RowParams) -> RowParams:
    """The settings of the first row."""
    return RowParams(*(int(values[0]) for values in params))


def bucket(length: int, limit: int, shortest: int = _SHORTEST_CACHE) -> int:
    """The size of cache or padded prompt for this many tokens: a power of two or 3/4 of one, at most `limit`."""
    size = shortest
    while size < length:
        size *= 2
    if size > shortest and length <= size * 3 // 4:
        size = size * 3 // 4
    return min(size, limit)


def _set_row(rows: Rows, row: int, one: Rows) -> None:
    """Copy the first row of `one` into a row of the batch."""
    for target, source in zip(jax.tree.leaves(rows), jax.tree.leaves(one), strict=True):
        target[row] = source[0]
