"""The server's routes: what is asked is read, decoded, and answered whole or in parts."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from s1jax.config import ServerSection
from s1jax.decoding.setup import Setup
from s1jax.serving.answers import Answer, Json
from s1jax.serving.asks import Ask, Reader
from s1jax.serving.body import ChatBody, CompletionBody, read_body
from s1jax.serving.budgets import FieldError
from s1jax.serving.exchange import DecodingError, Exchange
from s1jax.serving.metrics import Metrics
from s1jax.serving.text import Piece
from s1jax.serving.worker import QueueFullError, Worker
from s1jax.strict_json import parse_json

_RETRY_SECONDS = 5
_CLIENT_HAS_GONE = 499
_NOT_OPEN = ("/v1/", "/metrics")
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


class HttpError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def body(self) -> Json:
        """The error as OpenAI's API has it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        # Of one who was too slow, what comes late is no request of its own.
        headers = {429: {"retry-after": str(_RETRY_SECONDS)}, 408: {"connection": "close"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)


class Service:
    """One model behind HTTP."""

    def __init__(
        self,
        section: ServerSection,
        model: str,
        setup: Setup,
        reader: Reader,
        worker: Worker,
        metrics: Metrics,
        key: str | None,
        log: Callable[[str], None],
    ):
        """`key` is what /v1 and /metrics want as a bearer's token; None: nothing."""
        self._section, self._model, self._setup, self._reader = section, model, setup, reader
        self._worker, self._metrics, self._key, self._log = worker, metrics, key, log
        self._started = int(time.time())
        # Templates and tokenizers take their time, and are not for two threads at once.
        self._reading = ThreadPoolExecutor(1, "read")
        page = files("s1jax.serving").joinpath("page.html").read_text()
        self._page = HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY})

    def app(self) -> Starlette:
        """The application that a server runs."""

        def answering(kind: type[ChatBody] | type[CompletionBody]) -> Any:
            async def endpoint(request: HttpRequest) -> Response:
                return await self._answer(kind, request)

            return endpoint

        return Starlette(
            routes=[
                Route("/", self._checked(self._show_page)),
                Route("/health", self._checked(self._health)),
                Route("/metrics", self._checked(self._show_metrics)),
                Route("/v1/models", self._checked(self._models)),
                Route("/v1/chat/completions", self._checked(answering(ChatBody)), methods=["POST"]),
                Route("/v1/completions", self._checked(answering(CompletionBody)), methods=["POST"]),
            ]
        )

    def _checked(self, endpoint: Any) -> Any:
        """The endpoint, for those who have the key, its errors as answers, its requests counted."""

        async def checked(request: HttpRequest) -> Response:
            try:
                if request.url.path.startswith(_NOT_OPEN):
                    self._check_key(request)
                response: Response = await endpoint(request)
            except HttpError as error:
                response = error.response()
            self._metrics.requests.labels(response.status_code).inc()
            return response

        return checked

    def _check_key(self, request: HttpRequest) -> None:
        if self._key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(given, self._key.encode()):
            raise HttpError(401, "invalid_api_key", "this server wants its key: Authorization: Bearer ...")

    async def _show_page(self, request: HttpRequest) -> Response:
        return self._page

    async def _health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: HttpRequest) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: HttpRequest) -> Response:
        model = {
            "id": self._model,
            "object": "model",
            "created": self._started,
            "owned_by": "s1jax",
            "max_model_len": self._setup.context_length,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def _answer(self, kind: type[ChatBody] | type[CompletionBody], request: HttpRequest) -> Response:
        """Either kind of request, answered whole or as a stream."""
        raw = await self._json(request)
        try:
            body = read_body(kind, raw)
            if body.model not in (None, self._model):
                raise HttpError(404, "model_not_found", f"model: this server has {self._model}", "model")
            ask = await asyncio.get_running_loop().run_in_executor(self._reading, partial(self._reader.read, body, raw))
        except FieldError as error:
            raise HttpError(400, "invalid_value", str(error), error.field) from None
        answer = Answer(ask, self._model, self._setup.tokenizer, self._setup.profile)
        try:
            exchange = Exchange(ask, answer, self._worker, self._metrics, self._log)
        except QueueFullError as error:
            raise HttpError(429, "queue_full", str(error)) from None
        asked = f": {json.dumps(raw)}" if self._section.log_prompts else ""
        self._log(f"{answer.id} asked for {len(ask.requests)}{asked}")
        if body.stream:
            return _Stream(self._events(ask, answer, exchange), exchange)
        return await self._whole(request, answer, exchange)

    async def _json(self, request: HttpRequest) -> Any:
        """The body's value, once it is known to be no longer and to take no longer than it may."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A page of another site can send a form without asking its browser, but not this.
            raise HttpError(415, "content_type", "content-type: expected application/json")
        most = self._section.max_body_bytes
        content = bytearray()
        try:
            async with asyncio.timeout(self._section.receive_seconds):
                async for part in request.stream():
                    content += part
                    if len(content) > most:
                        raise HttpError(413, "too_large", f"the body has more than {most} bytes")
        except TimeoutError:
            raise HttpError(408, "too_slow", f"the body took more than {self._section.receive_seconds:g} s") from None
        try:
            return parse_json(bytes(content))
        except ValueError as error:
            raise HttpError(400, "invalid_json", str(error)) from None

    async def _parts(self, exchange: Exchange) -> AsyncIterator[tuple[int, list[Piece]]]:
        """What comes of a request, in the words of HTTP where it fails."""
        seconds = self._section.request_seconds
        try:
            async for number, pieces in exchange.parts(seconds):
                yield number, pieces
        except DecodingError as error:
            raise HttpError(500, "failed", str(error)) from None
        except TimeoutError:
            raise HttpError(504, "timeout", f"it took more than {seconds:g} s") from None

    async def _whole(self, request: HttpRequest, answer: Answer, exchange: Exchange) -> Response:
        """The answer once it is there, or nothing if nobody waits for it any more."""

        async def read_all() -> Response:
            async for _ in self._parts(exchange):
                pass
            return JSONResponse(answer.whole())

        reading, gone = asyncio.create_task(read_all()), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((reading, gone), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else Response(status_code=_CLIENT_HAS_GONE)
        finally:
            exchange.close()
            reading.cancel()
            gone.cancel()

    async def _events(self, ask: Ask, answer: Answer, exchange: Exchange) -> AsyncIterator[str]:
        """The answer as server-sent events, an error as the last of them."""
        try:
            if isinstance(ask.body, ChatBody):
                yield _event(answer.first_part())
            async for number, pieces in self._parts(exchange):
                for part in answer.parts(number, pieces):
                    yield _event(part)
            if ask.body.stream_options and ask.body.stream_options.include_usage:
                yield _event(answer.usage_part())
        except HttpError as error:
            yield _event(error.body())
        yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Server-sent events of an exchange, which ends with them, be it before the first."""

    def __init__(self, events: AsyncIterator[str], exchange: Exchange):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


async def _gone(request: HttpRequest) -> None:
    """Return when the client has gone away; its request was read to its end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(part: Json) -> str:
    return f"data: {json.dumps(part)}\n\n"
