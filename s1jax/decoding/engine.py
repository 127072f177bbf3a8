"""The host's half of decoding: requests wait, take their places in the batch, and leave it as they finish."""

import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

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
from s1jax.decoding.profiles import ProfileIds
from s1jax.decoding.requests import Request, problem_of
from s1jax.decoding.results import Finished, Generation, Progress, generation_of, under
from s1jax.decoding.sampling import Sampling, request_key
from s1jax.mesh import batch_shards
from s1jax.model.load import LoadedModel
from s1jax.model.qwen import KVCache

STEPS_PER_CHUNK = 32
"""Decode steps between two looks of the host at the rows."""
_SHORTEST_PROMPT, _SHORTEST_CACHE = 64, 128


class OutOfMemoryError(RuntimeError):
    """The device could not hold the batch; the message says what was tried and what to lower."""


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


class _Tables(NamedTuple):
    """The texts that may be forced: for the device, where each list of wait texts starts in them, and for the host."""

    shared: Shared
    wait_starts: dict[tuple[str, ...], int]
    texts: WaitTexts


class Engine:
    """Decodes requests, `batch_size` at a time; more may be submitted while others are at work."""

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
        """Settings of all requests; `batch_size` is rounded up to what the mesh divides.

        With `share`, requests of one prompt, index and sample whose budgets answer alike, if they wait together, follow
        each other in one row, and each decodes only what it does not have in common with the one before. Results are
        those of each alone.
        """
        self._loaded, self._tokenizer, self._profile = loaded, tokenizer, profile
        self._sampling, self._seed, self._logprobs, self._share = sampling, seed, logprobs, share
        self._batch = batch_size + -batch_size % batch_shards(loaded.mesh)
        self._context = loaded.model.config.max_position_embeddings
        self._waiting: OrderedDict[Hashable, list[Request]] = OrderedDict()
        """Those that may follow each other in a row, by what they have in common."""
        self._slots: list[_Slot | None] = [None] * self._batch
        self._following: list[list[_Slot]] = [[] for _ in self._slots]
        """Of each row, what goes on with the beginning of the request that is there."""
        self._waits: dict[tuple[str, ...], ThinkingBudget] = {}
        """Every list of wait texts that was ever submitted, in a budget that has it: rows point to their places."""
        self._tables: _Tables | None = None
        """None if they are to be made anew."""
        self._cache: KVCache | None = None
        self._cache_slots = 0
        """Of the cache that was last asked for."""
        self._rows = self._start([], {})

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to decode."""
        return not self._waiting and not any(self._slots)

    @property
    def occupancy(self) -> tuple[int, int, int]:
        """Rows at work, tokens in their contexts, and slots of the cache in all rows."""
        at_work = self._rows.state.phase != Phase.DONE
        slots = self._cache[0].keys.shape[2] * self._batch if self._cache else 0
        return int(at_work.sum()), int(self._rows.state.length[at_work].sum()), slots

    def submit(self, request: Request) -> None:
        """Have a request decoded; returns at once.

        Raises ValueError if it has a `problem_of`, or a wait text that the tokenizer or the profile cannot have.
        """
        if problem := problem_of(request, self._profile, self._context):
            raise ValueError(f"prompt {request.index}: {problem}")
        if request.budget.waits not in self._waits:
            build_tables(self._profile, [request.budget], self._tokenizer)
            self._waits[request.budget.waits] = request.budget
            self._tables = None
        self._waiting.setdefault(self._in_common(request), []).append(request)

    def cancel(self, request: Request) -> None:
        """Drop a request, wherever it is; nothing happens if it has finished."""
        key = self._in_common(request)
        if key in self._waiting:
            self._waiting[key] = [other for other in self._waiting[key] if other is not request]
            if not self._waiting[key]:
                del self._waiting[key]
        for row, slot in enumerate(self._slots):
            self._following[row] = [other for other in self._following[row] if other.request is not request]
            if slot and slot.request is request:
                self._slots[row] = None
                self._rows.state.phase[row] = Phase.DONE
                if left := [other.request for other in self._following[row]]:
                    # Their beginning is not whole. They wait again, before all others.
                    self._waiting[key] = left + self._waiting.get(key, [])
                    self._waiting.move_to_end(key, last=False)
                    self._following[row] = []

    def run(self, requests: Iterable[Request]) -> Iterator[Progress | Finished]:
        """Submit requests and step until all are through; events are yielded as they come, in no fixed order.

        Raises as `submit` and `step` do.
        """
        for request in requests:
            self.submit(request)
        while not self.is_idle:
            yield from self.step()

    def step(self) -> list[Progress | Finished]:
        """Decode a chunk: what it wrote in each row, and the results that it completed.

        Raises OutOfMemoryError if the device is full, NonFiniteError if the model's scores are no numbers to draw from.
        """
        if self.is_idle:
            return []
        try:
            # Under the mesh, arrays that are made are on all its devices, those of other processes too.
            with jax.set_mesh(self._loaded.mesh):
                tables = self._tables = self._tables or self._make_tables()
                self._admit_waiting(tables)
                assert self._cache is not None
                self._cache = self._with_room(self._cache)
                self._cache, state, last_token, chunk = decode_chunk(
                    self._loaded.model,
                    self._sampling,
                    STEPS_PER_CHUNK,
                    self._logprobs,
                    self._loaded.params,
                    tables.shared,
                    self._cache,
                    self._rows,
                )
                state, last_token, chunk = to_host((state, last_token, chunk))
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            layers = self._loaded.model.config.num_hidden_layers
            raise OutOfMemoryError(
                f"out of device memory with {self._batch} rows x {self._cache_slots} cache slots in {layers} layers: "
                "lower batch_size, budget.max_thinking_tokens or max_total_tokens, or raise mesh.tensor"
            ) from error
        # Copies: arrays that come from a device cannot be written to.
        self._rows = self._rows._replace(state=jax.tree.map(np.array, state), last_token=np.array(last_token))
        events = [event for row, slot in enumerate(self._slots) if slot for event in self._events(row, slot, chunk)]
        if self.is_idle:
            # The next ones may be shorter, and attention reads every slot on most platforms.
            self._cache = None
        return events

    def _events(self, row: int, slot: _Slot, chunk: Chunk) -> Iterator[Progress | Finished]:
        """What a chunk means for a row, which the next request takes if its own has finished."""
        if not (finite := chunk.finite[:, row] | ~chunk.written[:, row]).all():
            raise self._nonfinite(slot, chunk.tokens[: int(np.argmin(finite)), row].tolist())
        yield slot.take(chunk, row)
        state = RowState(*(values[row] for values in self._rows.state))
        if state.phase != Phase.DONE:
            return
        result = self._result(slot, state)
        yield Finished(slot.request, result, len(slot.output_ids) - slot.num_shared_tokens)
        forks = [(other, self._fork(slot, other)) for other in self._following[row]]
        for same in (other for other, at in forks if at is None):
            reached = ThinkingEnd(_one(same.start.params).max_thinking_end)
            yield Finished(same.request, under(result, reached), 0)
        self._slots[row], self._following[row] = self._next(slot, forks)
        if continued := self._slots[row]:
            _set_row(self._rows, row, continued.start)

    def _make_tables(self) -> _Tables:
        """Of a size that other wait texts have room in, mostly: the compiled loop depends on it."""
        tables, wait_starts = build_tables(self._profile, list(self._waits.values()), self._tokenizer)
        texts = WaitTexts(np.asarray(tables.text_ids), np.asarray(tables.text_lengths))
        count, length = (bucket(size, sys.maxsize, least) for size, least in zip(texts.ids.shape, (8, 32), strict=True))
        tables = tables._replace(
            text_ids=jnp.pad(tables.text_ids, [(0, count - len(texts.ids)), (0, length - texts.ids.shape[1])]),
            text_lengths=jnp.pad(tables.text_lengths, (0, count - len(texts.ids))),
        )
        valid, end_tokens = jnp.asarray(self._profile.valid), jnp.asarray(self._profile.end_tokens or (0,), jnp.int32)
        return _Tables(Shared(tables, valid, end_tokens), wait_starts, texts)

    def _admit_waiting(self, tables: _Tables) -> None:
        for row in range(self._batch):
            if self._slots[row] is None and self._waiting:
                _, alike = self._waiting.popitem(last=False)
                first, *self._following[row] = [
                    _Slot(request, self._start([request], tables.wait_starts))
                    for request in sorted(alike, key=self._longest_first)
                ]
                self._slots[row] = first
                _set_row(self._rows, row, first.start)
                self._cache = self._prefilled(self._cache, row, first.request)

    def _in_common(self, request: Request) -> Hashable:
        """What requests with the same draws that answer alike have in common."""
        if not self._share:
            return id(request)
        budget, prompt = request.budget, tuple(request.prompt.prompt_ids)
        return request.index, request.sample, prompt, budget.max_answer_tokens, budget.max_total_tokens

    def _longest_first(self, request: Request) -> tuple[int, int]:
        thinking, _ = resolve_max_thinking_tokens(request.budget, request.prompt, self._profile, self._context)
        return -request.budget.num_ignore, -thinking

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

    def _fork(self, done: _Slot, other: _Slot) -> Fork | None:
        """Where a request parts from one that has finished; None if it does not."""
        if not self._profile.profile.thinks:
            return None
        assert self._tables is not None
        before, after = (Rules(_one(slot.start.params), self._tables.texts) for slot in (done, other))
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

    def _nonfinite(self, slot: _Slot, new_ids: list[int]) -> NonFiniteError:
        """What to raise of a row whose scores were not finite after these ids of a chunk."""
        request = slot.request
        input_ids = [*request.prompt.prompt_ids, *slot.output_ids, *new_ids]
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

    def _prefilled(self, cache: KVCache | None, row: int, request: Request) -> KVCache:
        """The cache with a prompt in this row."""
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
        self._cache_slots = slots
        return empty_cache(self._loaded.model, self._batch, slots) if cache is None else grow_cache(cache, slots)

    def _with_room(self, cache: KVCache) -> KVCache:
        """The cache, grown if one of the rows at work could outgrow it within a chunk."""
        rows = self._rows
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
