"""What the host keeps of a request while it is decoded, and the rows of a batch that it fills in."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from s1jax.decoding.budget import RowState, ThinkingEnd, start_rows
from s1jax.decoding.forks import Fork
from s1jax.decoding.loop import Chunk, Rows
from s1jax.decoding.profiles import ProfileIds
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Progress
from s1jax.decoding.sampling import request_key, sampling_params

_ROWS_FOR_WEIGHTS = 8
"""Up to so many a CPU's step takes little more than reading the weights."""


class Slot:
    """A request with all that was decoded of it."""

    def __init__(self, request: Request, start: Rows, limit: int):
        self.request = request
        self.start = start
        """The row before its first step, or the next one if it was put back; the only row of its batch."""
        self.limit = limit
        """The longest that its context can get, in tokens."""
        self.output_ids: list[int] = []
        self.forced: list[bool] = []
        self.logprobs: list[float] = []
        self.attempts: list[int] = []
        """Steps at which an end of the thinking was drawn."""
        self.num_shared_tokens = 0
        self.age = 0
        """Requests that came to work before it."""

    @property
    def context_ids(self) -> tuple[int, ...]:
        """Prompt and output."""
        return (*self.request.prompt.prompt_ids, *self.output_ids)

    def take(self, chunk: Chunk, column: int, state: RowState) -> Progress:
        """Keep what a chunk wrote in this row, after which its automaton stands so."""
        written = chunk.written[:, column]
        self.attempts += (len(self.output_ids) + np.flatnonzero(chunk.attempts[written, column])).tolist()
        new_ids = chunk.tokens[written, column].tolist()
        new_forced = chunk.forced[written, column].tolist()
        new_logprobs = chunk.logprobs[written, column].tolist()
        self.output_ids += new_ids
        self.forced += new_forced
        self.logprobs += new_logprobs
        return Progress(
            self.request,
            new_ids,
            new_forced,
            new_logprobs,
            int(state.num_thinking_tokens[column]) - self.request.prompt.num_thinking_tokens,
            int(state.num_waits[column]),
            ThinkingEnd(int(state.thinking_end[column])).reported,
        )

    def continue_from(self, done: "Slot", at: Fork, ends_in_newline: np.ndarray) -> Progress:
        """Begin at the step at which this request parts from another, whose keys and values are in the row's cache.

        Returns what it has in common with the other.
        """
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
        shared = self.output_ids.copy(), self.forced.copy(), self.logprobs.copy()
        return Progress(self.request, *shared, at.step, at.num_waits, None)


def column_counts(rows: int, *, fewer: bool) -> list[int]:
    """How many of a shard's rows there are programs for: all, or where each costs also less, down to one.

    Halves where a step takes time by the row, then quarters where it mostly reads weights: each is to be compiled.
    """
    counts = [rows]
    while fewer and counts[-1] > 1:
        counts.append(max(1, counts[-1] // (2 if counts[-1] > _ROWS_FOR_WEIGHTS else 4)))
    return counts


def columns(at_work: Sequence[int], batch: int, shards: int, counts: Sequence[int]) -> list[int]:
    """The rows to compute: of each shard those at work and others, up to the least of the counts that is enough."""
    free = ~np.isin(np.arange(batch), at_work).reshape(shards, -1)
    size = min(count for count in counts if count >= np.max(np.sum(~free, axis=1)))
    first = np.arange(batch).reshape(free.shape)
    return np.take_along_axis(first, np.argsort(free, axis=1, kind="stable"), axis=1)[:, :size].ravel().tolist()


def take_rows(rows: Rows, which: list[int]) -> Rows:
    """These rows, copied."""
    return jax.tree.map(lambda values: values[which], rows)


def put_rows(rows: Rows, which: list[int], new: Rows) -> None:
    """Copy the rows of `new` to these places."""
    for values, of_new in zip(jax.tree.leaves(rows), jax.tree.leaves(new), strict=True):
        values[which] = of_new


def state_of(rows: Rows, row: int) -> RowState:
    """The state of one row."""
    return RowState(*(values[row] for values in rows.state))


def start_of(
    requests: Sequence[Request],
    profile: ProfileIds,
    wait_starts: Mapping[tuple[str, ...], int],
    context: int,
    size: int,
) -> Rows:
    """The rows of these requests before their first step, and finished ones up to `size`."""
    params, state = start_rows(
        [r.budget for r in requests], [r.prompt for r in requests], profile, wait_starts, context, size
    )
    # A row without a request has a context of one padding token, so that its position is in the cache.
    state.length[len(requests) :] = 1
    sampling = sampling_params([r.sampling for r in requests], size)
    rows = Rows(state, params, np.zeros(size, np.int32), sampling, np.zeros((size, 2), np.uint32))
    for row, request in enumerate(requests):
        rows.last_token[row] = request.prompt.prompt_ids[-1]
        rows.key_data[row] = jax.random.key_data(request_key(request.seed, request.index, request.sample))
    return rows
