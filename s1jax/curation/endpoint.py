"""An OpenAI-compatible endpoint: one request to it, and what it means that one went wrong.

The key comes from the environment alone, and is taken out of all that the endpoint says before anyone sees it.
"""

import asyncio
import json
import logging
import os
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic_core import from_json

from s1jax.config_reader import ConfigError
from s1jax.curation.sections import EndpointSection

try:
    import httpx2
    from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, DefaultAsyncHttpxClient
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.name} is not installed: pip install '.[curation]'") from None

Messages = list[dict[str, str]]

_FATAL = {
    401: "the key is wrong or has expired",
    402: "the account has no money left",
    403: "the key may not do this",
    404: "is base_url or model wrong?",
}
_NEVER_CONNECTED = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_TRANSIENT = (408, 409, 425, 429)
_SHORTEST_SECRET = 8


class EndpointError(RuntimeError):
    """What no further request would get past; the message is for the person who started the run."""


class FailureError(Exception):
    """One request, or what came of it, is of no use."""

    def __init__(
        self,
        reason: str,
        kind: Literal["transient", "rubbish", "final"],
        *,
        retry_after: float = 0.0,
        free: bool = False,
    ):
        """`kind` says how often to try again, `retry_after` after how many seconds; `free` that nothing was billed."""
        super().__init__(reason)
        self.reason, self.kind, self.retry_after, self.free = reason, kind, retry_after, free


class Endpoint:
    """Sends single requests; used as an async context manager."""

    def __init__(self, section: EndpointSection, name: str):
        """Check the section, whose key in the configuration is `name`, and read the key. Raises ConfigError."""
        self._section, self._key = section, _read_key(section, name)
        # Its debug log has headers of the answers, which may repeat the key.
        logging.getLogger("openai").setLevel(logging.WARNING)
        # The questions are for this endpoint, and not for whoever it names: redirects are told, not followed.
        self._client = AsyncOpenAI(
            api_key=self._key,
            base_url=section.base_url,
            max_retries=0,
            timeout=section.timeout,
            http_client=DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.close()

    async def send(self, messages: Messages) -> dict[str, Any]:
        """The JSON object that the endpoint answers, whatever its fields.

        Raises FailureError for this request, EndpointError if no other would do better.
        """
        section = self._section
        try:
            async with asyncio.timeout(section.timeout):
                response = await self._client.chat.completions.with_raw_response.create(
                    model=section.model or "",
                    messages=messages,  # type: ignore[arg-type]
                    extra_body={section.max_tokens_key: section.max_tokens, **section.extra_body},
                )
        except (TimeoutError, APIConnectionError) as error:
            cause = error.__cause__
            said = f"no answer within {section.timeout:g} s"
            if not isinstance(error, TimeoutError | APITimeoutError):
                said = self._clean(f"connection lost: {cause or error}")
            raise FailureError(said, "transient", free=isinstance(cause, _NEVER_CONNECTED)) from None
        except APIStatusError as error:
            raise self._status_failure(error) from None
        return self._parse(response.http_response.content)

    def _parse(self, body: bytes) -> dict[str, Any]:
        try:
            # Unlike json.loads, it refuses what could not be written to a file or read back: half a surrogate pair,
            # NaN, hundreds of lists in each other.
            value = from_json(body, allow_inf_nan=False)
        except ValueError:
            raise FailureError(f"not JSON: {self._clean(body.decode(errors='replace'))}", "rubbish") from None
        if not isinstance(value, dict):
            raise FailureError(f"not a JSON object, but a {type(value).__name__}", "rubbish")
        redacted: dict[str, Any] = json.loads(self._redact(json.dumps(value, ensure_ascii=False)))
        return redacted

    def _status_failure(self, error: APIStatusError) -> FailureError | EndpointError:
        """What an error status means: for this question, or for the run."""
        status = error.status_code
        said = self._clean(f"HTTP {status}: {error.message}")
        fatal = _FATAL.get(status) or (_FATAL[402] if error.code == "insufficient_quota" else None)
        if 300 <= status < 400:
            target = self._clean(error.response.headers.get("location", "nowhere"))
            return EndpointError(f"{self._section.base_url}: it redirects to {target}: is base_url wrong?")
        if fatal:
            return EndpointError(f"{self._section.base_url}: {fatal} ({said})")
        if status not in _TRANSIENT and status < 500:
            return FailureError(said, "final", free=True)
        wait = _retry_after(error.response.headers.get("retry-after"))
        if wait > self._section.max_retry_after:
            return EndpointError(f"{self._section.base_url}: it asks to wait {wait:.0f} s ({said})")
        return FailureError(said, "transient", retry_after=wait, free=True)

    def _redact(self, text: str) -> str:
        """The text without the key. A key of a few characters, which local servers want, is no secret, but a word."""
        return text.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_SECRET else text

    def _clean(self, text: str) -> str:
        """What the endpoint said, as part of a line."""
        return " ".join(self._redact(text).split())[:200]


def _read_key(section: EndpointSection, name: str) -> str:
    missing = [f"{name}.{key}: required" for key in ("base_url", "model") if not getattr(section, key)]
    if missing:
        raise ConfigError("\n".join(missing))
    url = urlsplit(section.base_url or "")
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query:
        raise ConfigError(f"{name}.base_url: expected a URL as https://host/v1, without a password or a query")
    if section.max_cost is not None and section.price_in == section.price_out == 0:
        raise ConfigError(f"{name}.max_cost: it says nothing without price_in and price_out")
    # Someone may have put the key itself there: a value that does not look like a name is not shown.
    shown = section.api_key_env if re.fullmatch("[A-Z][A-Z0-9_]*", section.api_key_env) else "the variable it names"
    key = os.environ.get(section.api_key_env, "").strip()
    if not key:
        raise ConfigError(f"{name}.api_key_env: {shown} is not set (a server without keys takes any value)")
    if not re.fullmatch(r"[!#-\[\]-~]+", key):
        raise ConfigError(f"{name}.api_key_env: {shown} holds characters that no key has")
    return key


def _retry_after(header: str | None) -> float:
    """The seconds that a Retry-After header asks for, given as a number or a date; 0 if it says neither."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header or "").timestamp() - time.time())
    except ValueError:
        return 0.0
