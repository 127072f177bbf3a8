"""Many questions to one endpoint, each until it is done or failed, with a journal that a killed run goes on from.

The journal has a line for each request that ended a question or cost something, with the response as it came. All else
is derived from it, so that nothing can come apart when a run ends between two writes.
"""

import asyncio
import hashlib
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from s1jax.curation.endpoint import Endpoint, EndpointError, FailureError, Messages
from s1jax.curation.message import Reply, read_reply, read_usage
from s1jax.curation.sections import EndpointSection
from s1jax.jsonl import InputError, RowWriter, replace_rows, stream_rows
from s1jax.paths import AnyPath
from s1jax.progress import progress
from s1jax.resume import keep_settings

STATUSES = ("done", "failed", "unasked")
_TEMPLATE_TOKENS = 100
"""More than a chat template adds to a prompt."""


@dataclass(frozen=True)
class Ask:
    """One question as it is sent."""

    id: str
    messages: Messages

    @property
    def digest(self) -> str:
        """By which an answer is known to be to this question."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()[:16]

    def most_prompt_tokens(self) -> int:
        """A bound: a token is at least one byte."""
        return sum(len(message["content"].encode()) for message in self.messages) + _TEMPLATE_TOKENS


def user_turn(text: str) -> Messages:
    """The messages of a prompt that is one turn of the user."""
    return [{"role": "user", "content": text}]


def ask_all(
    name: str,
    section: EndpointSection,
    asks: Sequence[Ask],
    *,
    journal: AnyPath,
    results: AnyPath,
    settings: dict[str, Any],
    fields: tuple[str, ...],
    read: Callable[[Reply], dict[str, Any]],
) -> dict[str, int]:
    """Ask what has not ended yet, and write a result for each question that has.

    `read` makes a result's `fields` of a reply, or raises FailureError for one that is of no use. A journal is gone
    on with only if model, extra_body and `settings` are those it was begun with. Returns the counts of questions done,
    failed and, at a cap, unasked. The caller sees to it that no other run writes there. Raises ConfigError; InputError
    if a file cannot be used; WriteError; EndpointError, after the results are written, if the endpoint answers nobody.
    """
    endpoint = Endpoint(section, f"{name}.endpoint")
    same = {"model": section.model, "extra_body": section.extra_body, **settings}
    keep_settings(same, journal, journal.with_name(journal.name + ".config.json"))
    with _Journal(journal) as kept:
        for ask in asks:
            if kept.asked.get(ask.id, ask.digest) != ask.digest:
                raise InputError(f"{journal}: the answer to id {ask.id!r} is to another question: move it away")
        run = _Run(section, endpoint, kept, read)
        waiting = [ask for ask in asks if kept.status.get(ask.id) not in run.ended]
        ended = len(asks) - len(waiting)
        with progress("question", len(asks), initial=ended, name=name) as bar:
            asyncio.run(run.ask(waiting, bar))
        ids = {ask.id for ask in asks}
        try:
            replace_rows(results, (_result(row, fields, read) for row in kept.endings() if row["id"] in ids))
        except FailureError as error:
            raise InputError(f"{journal}: an answer of an earlier run is of no use: {error}: move it away") from None
        counts = Counter(kept.status.get(ask.id, "unasked") for ask in asks)
    summary = ", ".join(f"{counts[status]} {status}" for status in STATUSES) + f"; {kept.cost:.4f} spent"
    if run.fatal:
        raise EndpointError(f"{run.fatal}; {summary}")
    if counts["unasked"]:
        tokens, cost = max(run.most(ask) for ask in waiting)
        summary += f"; a cap is reached (a question may take up to {tokens} tokens, {cost:.4f}): raise it to go on"
    print(f"{name}: {summary}", file=sys.stderr)
    return {status: counts[status] for status in STATUSES}


def _result(row: dict[str, Any], fields: tuple[str, ...], read: Callable[[Reply], dict[str, Any]]) -> dict[str, Any]:
    found = read(read_reply(row["response"])) if row["status"] == "done" else dict.fromkeys(fields)
    before, after = ("id", "status", "reason"), ("prompt_tokens", "completion_tokens", "cost")
    return {**{key: row[key] for key in before}, **found, **{key: row[key] for key in after}}


_COLUMNS = {
    **dict.fromkeys(("id", "asked", "status"), str),
    "reason": str | None,
    **dict.fromkeys(("prompt_tokens", "completion_tokens", "tokens"), int),
    "cost": int | float,
    "response": dict | None,
}
"""Of a journal, with the types of their values."""


class _Journal:
    """The lines of earlier runs and of this one."""

    def __init__(self, path: AnyPath):
        self._path = path
        self.status: dict[str, str] = {}
        """Of each question that has ended: done or failed."""
        self.asked: dict[str, str] = {}
        """The digest of what each question was when it was last asked."""
        self._last: dict[str, int] = {}
        self._costs: dict[str, float] = defaultdict(float)
        self._lines = 0
        self.tokens, self.cost = 0, 0.0
        """What all runs together have spent, at most."""
        for row in stream_rows(path, **_COLUMNS):
            self._count(row)
        self._writer = RowWriter(path)

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._writer.__exit__(*exception)

    def add(self, row: dict[str, Any]) -> None:
        """Append a line, as `RowWriter` does."""
        self._writer.append([row])
        self._count(row)

    def endings(self) -> Iterator[dict[str, Any]]:
        """The line that ended each question, with all that the question cost. None can be added after that."""
        self._writer.close()
        for number, row in enumerate(stream_rows(self._path)):
            if self._last.get(row["id"]) == number:
                yield {**row, "cost": self._costs[row["id"]]}

    def _count(self, row: dict[str, Any]) -> None:
        if row["status"] != "retried":
            self.status[row["id"]] = row["status"]
            self._last[row["id"]] = self._lines
        self.asked[row["id"]] = row["asked"]
        self._costs[row["id"]] += row["cost"]
        self.cost += row["cost"]
        self.tokens += row["tokens"]
        self._lines += 1


class _Run:
    """Asks questions side by side, within the caps: what a request may cost at most is set aside before it is sent."""

    def __init__(
        self, section: EndpointSection, endpoint: Endpoint, journal: _Journal, read: Callable[[Reply], dict[str, Any]]
    ):
        self._section, self._endpoint, self._journal, self._read = section, endpoint, journal, read
        self.ended = ("done",) if section.retry_failed else ("done", "failed")
        self.fatal: EndpointError | None = None
        self._stopped = asyncio.Event()
        self._reserved_tokens, self._reserved_cost = 0, 0.0

    async def ask(self, asks: Sequence[Ask], bar: tqdm) -> None:
        """Ask until all have ended, or none of the rest may be asked."""
        running: set[asyncio.Task[bool]] = set()

        async def settle() -> None:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            ended = 0
            for task in done:
                running.discard(task)
                ended += task.result()
            bar.set_postfix_str(f"{self._journal.cost:.4f} spent", refresh=False)
            bar.update(ended)

        async with self._endpoint:
            try:
                for ask in asks:
                    while running and (len(running) >= self._section.concurrency or not self._fits(ask)):
                        await settle()
                    if self._stopped.is_set() or not self._fits(ask):
                        break
                    self._reserve(ask, 1)
                    running.add(asyncio.create_task(self._ask_reserved(ask)))
                while running:
                    await settle()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def most(self, ask: Ask) -> tuple[int, float]:
        """Tokens and money that one request may cost at most."""
        prompt, answer = ask.most_prompt_tokens(), self._section.max_tokens
        return prompt + answer, self._cost(prompt, answer)

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self._section.price_in + completion_tokens * self._section.price_out) / 1e6

    def _reserve(self, ask: Ask, sign: int) -> None:
        tokens, cost = self.most(ask)
        self._reserved_tokens += sign * tokens
        self._reserved_cost += sign * cost

    def _fits(self, ask: Ask | None) -> bool:
        """Whether this question can be asked within the caps; None: whether those under way can."""
        tokens, cost = self.most(ask) if ask else (0, 0.0)
        max_tokens, max_cost = self._section.max_total_tokens, self._section.max_cost
        return (max_tokens is None or self._journal.tokens + self._reserved_tokens + tokens <= max_tokens) and (
            max_cost is None or self._journal.cost + self._reserved_cost + cost <= max_cost
        )

    async def _ask_reserved(self, ask: Ask) -> bool:
        """Ask until the question has ended, and return True; False if it may not be asked further in this run."""
        try:
            return await self._ask(ask)
        except EndpointError as error:
            self.fatal = self.fatal or error
            self._stopped.set()
            return False
        finally:
            self._reserve(ask, -1)

    async def _ask(self, ask: Ask) -> bool:
        tries: Counter[str] = Counter()
        limits = {
            "transient": self._section.max_retries,
            "rubbish": self._section.max_rubbish_retries,
            "final": 0,
        }
        while True:
            response, failure = None, None
            try:
                response = await self._endpoint.send(ask.messages)
                self._read(read_reply(response))
            except FailureError as error:
                failure = error
            status = "done"
            if failure:
                tries[failure.kind] += 1
                status = "retried" if tries[failure.kind] <= limits[failure.kind] else "failed"
            self._keep(ask, status, failure, response)
            if failure is None or status == "failed":
                return True
            if await self._stopped_within(self._delay(failure, tries.total())) or not self._fits(None):
                return False

    def _keep(self, ask: Ask, status: str, failure: FailureError | None, response: dict[str, Any] | None) -> None:
        """Write the journal's line, unless the request neither ended the question nor cost anything."""
        usage = read_usage(response)
        prompt, answer = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        tokens, cost = prompt + answer, self._cost(prompt, answer)
        if usage is None and not (failure and failure.free):
            tokens, cost = self.most(ask)  # Nobody says what was billed.
        if status != "retried" or tokens:
            ending = {"id": ask.id, "asked": ask.digest, "status": status, "reason": failure and failure.reason}
            spent = {"prompt_tokens": prompt, "completion_tokens": answer, "tokens": tokens, "cost": cost}
            self._journal.add({**ending, **spent, "response": response})

    def _delay(self, failure: FailureError, tries: int) -> float:
        """Seconds until the next try: the doubled back-off less up to half of it, but not less than was asked for."""
        section = self._section
        longest = min(section.max_backoff, section.backoff * 2 ** min(tries - 1, 60))
        return max(failure.retry_after, longest * random.uniform(0.5, 1))

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return False
        return True
