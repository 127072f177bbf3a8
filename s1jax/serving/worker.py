"""The engine in a thread of its own: requests wait here in their order, and what becomes of each is handed back."""

import heapq
import itertools
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from s1jax.decoding.cache import Occupancy
from s1jax.decoding.engine import Engine
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished, Progress


class QueueFullError(RuntimeError):
    """More requests wait than may."""


@dataclass(frozen=True)
class Failed:
    """A request that cannot be decoded."""

    request: Request
    error: Exception


Event = Progress | Finished | Failed
Deliver = Callable[[Event], None]


class Worker:
    """Decodes requests by priority, then in the order in which they came; safe to call from any thread.

    The engine is given somewhat more than it has rows for, so that a row that becomes free is taken at once; the others
    wait here, where those with a lower `priority` number go first.
    """

    def __init__(
        self,
        engine: Engine,
        rebuild: Callable[[], Engine],
        max_waiting: int,
        watch: Callable[[int, Occupancy], None],
    ):
        """`rebuild` makes another engine after an error that ends one; it is called in this worker's thread.

        `watch` is told, after each chunk, how many wait, and what the engine holds.
        """
        self._engine, self._rebuild = engine, rebuild
        self._given_at_once = engine.batch_size + -(-engine.batch_size // 4)
        self._max_waiting, self._watch = max_waiting, watch
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, Request, Deliver]] = []
        self._numbers = itertools.count()
        self._at_work: dict[int, tuple[Request, Deliver]] = {}
        """By identity: two that are equal are still two."""
        self._cancelled: list[Request] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], deliver: Deliver, priority: int = 0) -> None:
        """Have requests decoded, all or none; `deliver` is called, in the worker's thread, with what becomes of them.

        Raises QueueFullError.
        """
        with self._changed:
            if len(self._waiting) + len(requests) > self._max_waiting:
                raise QueueFullError(f"{len(self._waiting)} answers wait, and {self._max_waiting} may")
            for request in requests:
                heapq.heappush(self._waiting, (priority, next(self._numbers), request, deliver))
            self._changed.notify()

    def cancel(self, requests: Sequence[Request]) -> None:
        """Drop requests, wherever they are; nothing happens to those that have finished."""
        dropped = set(map(id, requests))
        with self._changed:
            self._waiting = [entry for entry in self._waiting if id(entry[2]) not in dropped]
            heapq.heapify(self._waiting)
            self._cancelled += requests
            self._changed.notify()

    def close(self) -> None:
        """Stop after the chunk at work; what is not finished then stays so."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._take_turns():
            try:
                events: list[Event] = [*self._engine.step()]
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                events = [Failed(request, error) for request, _ in self._at_work.values()]
                self._engine = self._rebuild()
            for event in events:
                # What was cancelled meanwhile is nobody's any more.
                _, deliver = self._at_work.get(id(event.request), (None, None))
                if not isinstance(event, Progress):
                    self._at_work.pop(id(event.request), None)
                if deliver:
                    deliver(event)
            self._watch(len(self._waiting), self._engine.occupancy)

    def _take_turns(self) -> bool:
        """Give the engine what is next, once there is something to do; False if it is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._cancelled or self._at_work)
            if self._closed:
                return False
            cancelled, self._cancelled = self._cancelled, []
            for request in cancelled:
                if self._at_work.pop(id(request), None):
                    self._engine.cancel(request)
            while self._waiting and len(self._at_work) < self._given_at_once:
                _, _, request, deliver = heapq.heappop(self._waiting)
                try:
                    self._engine.submit(request)
                except ValueError as error:
                    deliver(Failed(request, error))
                    continue
                self._at_work[id(request)] = request, deliver
            return True
