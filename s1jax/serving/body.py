"""The body of a request: every field is known and means something here, or the request is refused with its name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s1jax.serving.budgets import BUDGET_FIELDS, FieldError, unknown_field

Count = Annotated[int, Field(ge=1, lt=2**31)]
TokenIds = list[int]

_HAS_NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields of OpenAI's API that are about something else than the answer."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_logprobs": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields that other servers have, and the values of each that ask for nothing."""


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None


class Body(BaseModel):
    """What both kinds of request have; None is what a client leaves to the server."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    n: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower ones go first, as in vLLM."""
    return_token_ids: bool | None = None
    """Whether the answer has the ids of prompt and output, and which of them were forced."""
    mark_forced: bool | None = None
    """Whether text that the budget wrote comes apart from the model's, and says so."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat."""

    model_config = ConfigDict(strict=True, extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has them."""
        return bool(self.logprobs)

    @property
    def given(self) -> list[list[dict[str, str]]]:
        """The chats to answer, one."""
        texts = [m.content if isinstance(m.content, str) else "".join(p.text for p in m.content) for m in self.messages]
        return [[{"role": m.role, "content": text} for m, text in zip(self.messages, texts, strict=True)]]


class CompletionBody(Body):
    """Of /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    logprobs: Annotated[int, Field(ge=0, le=1)] | bool | None = None
    """Only the tokens' own: 0 and 1 are the same as true."""

    @property
    def given(self) -> list[Any]:
        """The prompts to continue, each a text or ids."""
        is_one = isinstance(self.prompt, str) or all(isinstance(part, int) for part in self.prompt)
        return [self.prompt] if is_one else [*self.prompt]

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has them."""
        return self.logprobs is not None and self.logprobs is not False


AnyBody = ChatBody | CompletionBody


def read_body(kind: type[ChatBody] | type[CompletionBody], body: Any) -> AnyBody:
    """Check a request's JSON, but for the budget in it. Raises FieldError for the first field that cannot be."""
    if not isinstance(body, dict):
        raise FieldError("body", f"expected an object, found {body!r:.60}")
    # A field that is null is one that was left out.
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in kind.model_fields or name in BUDGET_FIELDS or name in _HAS_NO_EFFECT:
            continue
        if name not in _ONLY:
            raise unknown_field(name)
        if value not in _ONLY[name]:
            allowed = " or ".join(map(repr, _ONLY[name]))
            raise FieldError(name, f"this server has only {allowed}, found {value!r:.60}")
    try:
        read = kind.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise FieldError(where, f"{problem['msg']}, found {problem['input']!r:.60}") from None
    if read.max_tokens and read.max_completion_tokens and read.max_tokens != read.max_completion_tokens:
        raise FieldError(
            "max_tokens", f"{read.max_tokens} contradicts max_completion_tokens {read.max_completion_tokens}"
        )
    if "" in read.stops:
        raise FieldError("stop", "holds an empty text")
    return read
