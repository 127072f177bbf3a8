"""One request at work: what the engine makes of it, and that it is dropped when nobody listens any more."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from s1jax.decoding.results import Finished
from s1jax.serving.answers import Answer
from s1jax.serving.asks import Ask
from s1jax.serving.metrics import Metrics
from s1jax.serving.text import Piece
from s1jax.serving.worker import Event, Failed, Worker


class DecodingError(RuntimeError):
    """The engine could not decode a request."""


class Exchange:
    """Submits a request to the worker when it is made; it is to be closed, however it ends."""

    def __init__(self, ask: Ask, answer: Answer, worker: Worker, metrics: Metrics, log: Callable[[str], None]):
        """Raises QueueFullError. To be made in the event loop that it is read in."""
        self._ask, self._answer, self._worker, self._metrics, self._log = ask, answer, worker, metrics, log
        self._started = time.perf_counter()
        self._numbers = {id(request): number for number, request in enumerate(ask.requests)}
        self._left = set(self._numbers.values())
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._closed = False
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        worker.submit(ask.requests, deliver, ask.body.priority or 0)

    async def parts(self, seconds: float) -> AsyncIterator[tuple[int, list[Piece]]]:
        """As they come, the number of a choice and its new pieces, until all have finished.

        Raises DecodingError, and TimeoutError if that takes longer than so many seconds.
        """
        first = True
        async with asyncio.timeout(seconds):
            while self._left:
                event = await self._events.get()
                if isinstance(event, Failed):
                    raise DecodingError(f"it could not be decoded: {event.error}")
                number = self._numbers[id(event.request)]
                if number not in self._left:
                    continue  # It came to a stop text, and the engine had gone on meanwhile.
                if first:
                    self._metrics.first_token_seconds.observe(time.perf_counter() - self._started)
                    first = False
                choice = self._answer.choices[number]
                pieces = choice.take(event)
                if choice.finish_reason:
                    self._left.discard(number)
                    if not isinstance(event, Finished):
                        self._worker.cancel([choice.request])
                yield number, pieces

    def close(self) -> None:
        """Drop what has not finished, and count the request; nothing happens the second time."""
        if self._closed:
            return
        self._closed = True
        self._worker.cancel([self._ask.requests[number] for number in self._left])
        usage, metrics, seconds = self._answer.usage(), self._metrics, time.perf_counter() - self._started
        thinking = usage["completion_tokens_details"]["reasoning_tokens"]
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.output_tokens.inc(usage["completion_tokens"])
        metrics.thinking_tokens.inc(thinking)
        metrics.forced_ends.inc(sum(choice.thinking_end in ("budget", "context") for choice in self._answer.choices))
        metrics.waits.inc(sum(choice.num_waits for choice in self._answer.choices))
        metrics.request_seconds.observe(seconds)
        metrics.cut_off.inc(bool(self._left))
        self._log(
            f"{self._answer.id} {'cut off' if self._left else 'answered'}: prompt {usage['prompt_tokens']} tokens, "
            f"thinking {thinking}, output {usage['completion_tokens']}, {seconds:.2f} s"
        )
