"""The host's half of decoding: requests wait, take their places in the batch, and leave it as they finish."""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jaxtyping import Array
from transformers import PreTrainedTokenizerBase

from s1jax.decoding.budget import (
    Phase,
    RowParams,
    RowState,
    ThinkingEnd,
    resolve_max_thinking_tokens,
)
from s1jax.decoding.cache import Occupancy, PagedCache
from s1jax.decoding.finite import NonFiniteError
from s1jax.decoding.forks import Fork, Rules, fork
from s1jax.decoding.hosts import to_host
from s1jax.decoding.loop import Chunk, Rows, decode_chunk
from s1jax.decoding.pages import bucket
from s1jax.decoding.prefill_queue import PIECE, SHORTEST_PIECE
from s1jax.decoding.profiles import ProfileIds
from s1jax.decoding.requests import Request, longest_context, problem_of
from s1jax.decoding.results import Finished, Progress, generation_of, under
from s1jax.decoding.sampling import Draws, draws_of
from s1jax.decoding.slot import Slot, column_counts, columns, put_rows, start_of, state_of, take_rows
from s1jax.decoding.wait_texts import TextRegister
from s1jax.mesh import batch_shards, divisible_rows
from s1jax.model import cpu_kernel
from s1jax.model.load import LoadedModel

STEPS_PER_CHUNK = 32
"""Decode steps between two looks of the host at the rows."""
_ALL_GREEDY = Draws(greedy=True)
_MOST_PREFILLED = 1024
"""Tokens of contexts that are computed, in each shard, between two chunks while other rows are at work."""


class OutOfMemoryError(RuntimeError):
    """The device could not hold the batch; the message says what was tried and what to lower."""


class _InFlight(NamedTuple):
    """A chunk that the device computes."""

    rows: Rows
    """Before it."""
    slots: list[tuple[int, Slot | None]]
    """Of each column its row of the batch, and which request was at work there."""
    results: tuple[RowState, Array, Chunk]


class Engine:
    """Decodes requests, `batch_size` at a time; more may be submitted while others are at work."""

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        profile: ProfileIds,
        *,
        batch_size: int = 8,
        cache_tokens: int | None = None,
        logprobs: bool = False,
        share: bool = True,
        steps_per_chunk: int = STEPS_PER_CHUNK,
    ):
        """Settings of all requests; `batch_size` is rounded up to what the mesh divides.

        `cache_tokens` are the most that all rows hold together; None: of every row as many as it can have, or what
        there is memory for. If they run out, the youngest request waits again, and goes on where it was.

        With `share`, requests of one prompt, index and sample whose budgets answer alike, if they wait together, follow
        each other in one row, and each decodes only what it does not have in common with the one before; and rows with
        one prompt compute it once. Results are those of each alone.
        """
        self._loaded, self._tokenizer, self._profile = loaded, tokenizer, profile
        self._logprobs, self._share, self._steps = logprobs, share, steps_per_chunk
        self._draws = Draws()
        """What any request so far asks of the sampler."""
        self._batch = divisible_rows(batch_size, loaded.mesh)
        self._shards = batch_shards(loaded.mesh)
        with jax.set_mesh(loaded.mesh):
            on_cpu = cpu_kernel.available(loaded.model.dtype)
        self._counts = column_counts(self._batch // self._shards, fewer=on_cpu)
        self._context = loaded.model.config.max_position_embeddings
        self._waiting: OrderedDict[Hashable, list[Request]] = OrderedDict()
        """Those that may follow each other in a row, by what they have in common."""
        self._next_up: deque[list[Slot]] = deque()
        """Groups that come before those: they were at work already, or there was no page for them."""
        self._groups: list[list[Slot]] = [[] for _ in range(self._batch)]
        """Of each row, the request that it was given to, and those that go on with its beginning."""
        self._beginning: set[int] = set()
        """Rows whose requests have yet to come to work: their contexts are being computed."""
        self._texts = TextRegister(profile, tokenizer)
        self._cache_tokens = cache_tokens
        self._cache = PagedCache(loaded, self._batch, cache_tokens, share=share)
        self._limit = 0
        """The longest that the context of a request submitted so far can get, rounded up."""
        self._admitted = 0
        self._rows, self._nobody = (start_of([], profile, {}, self._context, size) for size in (self._batch, 1))
        self._in_flight: _InFlight | None = None
        self._error: Exception | None = None
        """That ended it, after results that are reported first."""

    @property
    def batch_size(self) -> int:
        """Rows that are decoded at once."""
        return self._batch

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to decode."""
        return not self._waiting and not self._next_up and not any(self._groups)

    @property
    def occupancy(self) -> Occupancy:
        """What is held now."""
        at_work = self._at_work()
        return Occupancy(len(at_work), int(self._rows.state.length[at_work].sum()), *self._cache.size)

    def compile(self, draws: Draws, longest: int) -> None:
        """Have memory for rows of up to so many tokens, and all programs for such requests; none was submitted yet.

        Requests that ask for no other draws then wait for no compiler, but without a kernel for attention over pages
        once for each shorter table of them. Raises OutOfMemoryError, and ValueError where there is no room for one row.
        """
        self._draws, self._limit = draws, bucket(longest, self._context)
        with self._on_devices():
            self._cache.claim(self._limit)
            if longest > self._cache.limit:
                raise ValueError(self._no_room(longest))
            self._cache.compile()
            for count in self._counts:
                order = columns([], self._batch, self._shards, [count])
                for each in (_ALL_GREEDY, draws):
                    self._decode(order, each, self._limit)

    def submit(self, request: Request) -> None:
        """Have a request decoded; returns at once.

        Raises ValueError if it has a `problem_of`, or a wait text that the tokenizer or the profile cannot have.
        """
        if problem := problem_of(request, self._profile, self._context, self._cache_tokens):
            raise ValueError(f"prompt {request.index}: {problem}")
        self._texts.add(request.budget)
        self._draws |= draws_of(request.sampling)
        self._limit = max(self._limit, bucket(self._limit_of(request), self._context))
        self._waiting.setdefault(self._in_common(request), []).append(request)

    def cancel(self, request: Request) -> None:
        """Drop a request, wherever it is; nothing happens if it has finished."""
        key = self._in_common(request)
        if key in self._waiting:
            self._waiting[key] = [other for other in self._waiting[key] if other is not request]
            if not self._waiting[key]:
                del self._waiting[key]
        for row, group in enumerate(self._groups):
            if group and group[0].request is request:
                self._clear(row)
                # What follows it has not begun: its beginning would have been this one's.
                self._next_up.appendleft(group)
        for group in (*self._next_up, *self._groups):
            group[:] = [slot for slot in group if slot.request is not request]
        self._next_up = deque(group for group in self._next_up if group)

    def run(self, requests: Iterable[Request]) -> Iterator[Progress | Finished]:
        """Submit requests and step until all are through; events are yielded as they come, in no fixed order.

        Raises as `submit` and `step` do.
        """
        for request in requests:
            self.submit(request)
        while not self.is_idle:
            yield from self.step()

    def step(self) -> list[Progress | Finished]:
        """Have the next chunk computed, and meanwhile look at the one before: what it wrote, and what it completed.

        Raises OutOfMemoryError if the device is full, ValueError for a request that all pages would not hold,
        NonFiniteError if the model's scores are no numbers to draw from; each only after results that are there.
        """
        if self._error:
            raise self._error
        if self.is_idle:
            return []
        events: list[Progress | Finished] = []
        with self._on_devices():
            in_flight = self._in_flight or self._dispatch()
            state, last_token, chunk = to_host(in_flight.results)
        # Of a request that was cancelled meanwhile nothing is kept.
        at_work = [
            (row, column, slot)
            for column, (row, slot) in enumerate(in_flight.slots)
            if slot is not None and self._groups[row][:1] == [slot]
        ]
        finite = chunk.finite | ~chunk.written
        if not (sound := finite.all(axis=0)).all():
            for _, column, slot in at_work:
                if not sound[column]:
                    new_ids = chunk.tokens[: int(np.argmin(finite[:, column])), column].tolist()
                    self._error = self._error or self._nonfinite(slot, new_ids)
            at_work = [item for item in at_work if sound[item[1]]]
        new = in_flight.rows._replace(state=state, last_token=last_token)
        put_rows(self._rows, [row for row, _, _ in at_work], take_rows(new, [column for _, column, _ in at_work]))
        done = state.phase == Phase.DONE
        try:
            with self._on_devices():
                # First what the next chunk depends on.
                for row, column, slot in at_work:
                    if done[column]:
                        events += [slot.take(chunk, column, state), *self._finish(row)]
                self._in_flight = None if self.is_idle or self._error else self._dispatch()
        except (OutOfMemoryError, ValueError) as error:
            self._error = error
        return events + [slot.take(chunk, column, state) for _, column, slot in at_work if not done[column]]

    @contextmanager
    def _on_devices(self) -> Iterator[None]:
        """Under the mesh arrays that are made are on all its devices, those of other processes too."""
        try:
            with jax.set_mesh(self._loaded.mesh):
                yield
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            layers = self._loaded.model.config.num_hidden_layers
            raise OutOfMemoryError(
                f"out of device memory with {self._batch} rows of up to {self._limit} tokens in {layers} layers: "
                "lower cache.tokens, batch_size, budget.max_thinking_tokens or max_total_tokens, or raise mesh.tensor"
            ) from error

    def _dispatch(self) -> _InFlight:
        """Give the device a chunk to compute, without waiting for it."""
        self._admit_waiting()
        self._make_room()
        at_work = self._at_work()
        order = columns(at_work, self._batch, self._shards, self._counts)
        # Rows that are all greedy, however others were drawn before them, pay for no draws.
        draws = _ALL_GREEDY if (self._rows.sampling.temperature[order] == 0).all() else self._draws
        rows, results = self._decode(order, draws, max(map(self._ahead, at_work)))
        slots = [(row, self._groups[row][0] if row in at_work else None) for row in order]
        return _InFlight(rows, slots, results)

    def _decode(self, order: list[int], draws: Draws, tokens: int) -> tuple[Rows, tuple[RowState, Array, Chunk]]:
        """A chunk of these rows, of which none gets more tokens than so many, and the rows before it."""
        rows = take_rows(self._rows, order)
        assert self._cache.arrays is not None
        self._cache.arrays, *results = decode_chunk(
            self._loaded.model,
            draws,
            self._steps,
            self._logprobs,
            self._loaded.params,
            self._texts.tables().shared,
            self._cache.arrays,
            self._cache.table(order, tokens),
            rows,
        )
        return rows, (*results,)

    def _finish(self, row: int) -> Iterator[Progress | Finished]:
        """The results of a row's request, and who follows: the next that goes on with its beginning, or nobody."""
        slot, *others = self._groups[row]
        state = state_of(self._rows, row)
        logprobs = slot.logprobs if self._logprobs else None
        result = generation_of(
            slot.request.prompt, slot.output_ids, slot.forced, logprobs, state, self._profile, self._tokenizer
        )
        yield Finished(slot.request, result, len(slot.output_ids) - slot.num_shared_tokens)
        forks = [(other, self._fork(slot, other)) for other in others]
        for same in (other for other, at in forks if at is None):
            reached = ThinkingEnd(_one(same.start.params).max_thinking_end)
            yield Finished(same.request, under(result, reached), 0)
        left = [(other, at) for other, at in forks if at is not None]
        if not left:
            self._clear(row)
            return
        # The one with most in common first.
        first, at = max(left, key=lambda item: item[1].step)
        yield first.continue_from(slot, at, self._profile.ends_in_newline)
        first.age = slot.age
        self._groups[row] = [first, *(other for other, _ in left if other is not first)]
        start = first.start
        put_rows(self._rows, [row], start)
        self._cache.shorten(row, int(start.state.length[0]))

    def _admit_waiting(self) -> None:
        """Give free rows to those that wait, in their order, as long as there are pages for them."""
        if self._cache.asked < self._limit and not any(self._groups):
            self._cache.claim(self._limit)
        for row in range(self._batch):
            if self._groups[row]:
                continue
            if not self._next_up and self._waiting:
                _, alike = self._waiting.popitem(last=False)
                self._next_up.append([self._slot_of(request) for request in sorted(alike, key=self._longest_first)])
            if not self._next_up:
                break
            slot = self._next_up[0][0]
            if slot.limit > self._cache.limit:
                if any(self._groups):
                    break  # More can be claimed when nobody is at work.
                raise ValueError(f"prompt {slot.request.index}: {self._no_room(slot.limit)}")
            tokens = min(len(slot.context_ids) + self._steps, slot.limit)
            if not self._cache.admits(row, tokens):
                continue
            self._groups[row] = self._next_up.popleft()
            self._admitted += 1
            slot.age = self._admitted
            prompt_length = len(slot.request.prompt.prompt_ids)
            self._cache.begin(row, slot.context_ids, tokens, prompt_length=prompt_length)
            self._beginning.add(row)
        self._cache.fill(_MOST_PREFILLED if self._at_work() else None)
        for row in self._beginning - self._cache.unfilled:
            put_rows(self._rows, [row], self._groups[row][0].start)
            self._beginning.remove(row)

    def _no_room(self, tokens: int) -> str:
        room, less = self._cache.limit, "lower max_total_tokens or the budget, or raise cache.tokens or mesh.tensor"
        return f"may need {tokens} tokens, and a row has room for {room}: {less}"

    def _at_work(self) -> list[int]:
        """The rows that a chunk decodes in."""
        return [row for row, group in enumerate(self._groups) if group and row not in self._beginning]

    def _make_room(self) -> None:
        """See to it that every row has pages for a chunk; where there are not enough, the youngest wait again."""
        by_age = sorted((group[0].age, row) for row, group in enumerate(self._groups) if group)
        for _, row in by_age:
            while self._groups[row] and not self._cache.extend(row, self._ahead(row)):
                beside = self._cache.neighbours(row)
                self._put_back([other for _, other in by_age if self._groups[other] and other in beside][-1])

    def _put_back(self, row: int) -> None:
        """Have the request of a row wait, with what it has decoded, before all others."""
        if row not in self._beginning:
            self._groups[row][0].start = take_rows(self._rows, [row])
        self._next_up.appendleft(self._groups[row])
        self._clear(row)

    def _clear(self, row: int) -> None:
        """Nobody is in a row."""
        self._groups[row] = []
        self._beginning.discard(row)
        self._cache.release(row)
        put_rows(self._rows, [row], self._nobody)

    def _ahead(self, row: int) -> int:
        """Tokens that a row may have after a chunk."""
        slot = self._groups[row][0]
        length = len(slot.context_ids) if row in self._beginning else int(self._rows.state.length[row])
        assert length <= slot.limit, "a row has outgrown its pages"
        return min(length + self._steps, slot.limit)

    def _in_common(self, request: Request) -> Hashable:
        """What requests with the same draws that answer alike have in common."""
        if not self._share:
            return id(request)
        budget, prompt = request.budget, tuple(request.prompt.prompt_ids)
        draws = request.index, request.sample, request.seed, request.sampling
        return draws, prompt, budget.max_answer_tokens, budget.max_total_tokens

    def _longest_first(self, request: Request) -> tuple[int, int]:
        thinking, _ = resolve_max_thinking_tokens(request.budget, request.prompt, self._profile, self._context)
        return -request.budget.num_ignore, -thinking

    def compilations(self, requests: Sequence[Request]) -> int:
        """At most how many programs these requests need, submitted together."""
        longest = bucket(max(self._limit_of(r) for r in requests), self._context)
        lengths = range(min(len(r.prompt.prompt_ids) for r in requests), longest + 1)
        # Those that wait again are prefilled with what they have decoded. One program does all later pieces.
        pieces = {bucket(n, PIECE, SHORTEST_PIECE) for n in lengths}
        widths = {bucket(n, self._context) for n in lengths}
        # A cache, a copy of pages, prefills, and decode loops for some of the rows or for some widths of their table.
        return 2 + len(pieces) + (longest > PIECE) + max(len(widths), len(self._counts))

    def _limit_of(self, request: Request) -> int:
        return longest_context(request, self._profile, self._context)

    def _slot_of(self, request: Request) -> Slot:
        start = start_of([request], self._profile, self._texts.tables().starts, self._context, 1)
        return Slot(request, start, self._limit_of(request))

    def _fork(self, done: Slot, other: Slot) -> Fork | None:
        """Where a request parts from one that has finished; None if it does not."""
        if not self._profile.profile.thinks:
            return None
        texts = self._texts.tables().texts
        before, after = (Rules(_one(slot.start.params), texts) for slot in (done, other))
        in_prompt = done.request.prompt.num_thinking_tokens
        return fork(before, after, done.attempts, len(done.output_ids), in_prompt)

    def _nonfinite(self, slot: Slot, new_ids: list[int]) -> NonFiniteError:
        """What to raise of a row whose scores were not finite after these ids of a chunk."""
        request = slot.request
        input_ids = [*slot.context_ids, *new_ids]
        text = f"prompt {request.index}, sample {request.sample}, after {len(input_ids)} tokens"
        return NonFiniteError(text, self._loaded, input_ids)


def _one(params: RowParams) -> RowParams:
    """The settings of the first row."""
    return RowParams(*(int(values[0]) for values in params))
