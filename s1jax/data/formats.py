"""The shapes that training rows come in, each a pydantic model that can render its row as text.

`FORMATS` is ordered: a row is of the first format whose telling column it has. Finished text goes first,
since s1K_tokenized keeps the columns it was made from, and s1K-1.1 before s1K, whose columns it extends.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from transformers import PreTrainedTokenizerBase

from s1jax.data import chat
from s1jax.jsonl import describe


def _check_text(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty", "should not be empty")
    return value


def _check_list(value: list[str]) -> list[str]:
    if not value:
        raise PydanticCustomError("empty", "should not be empty")
    return value


def _check_absent(value: Any) -> Any:
    if value:
        raise PydanticCustomError("unsupported", "is not supported, it would be left out of the training text")
    return value


Absent = Annotated[Any, AfterValidator(_check_absent)]
Text = Annotated[str, AfterValidator(_check_text)]
Texts = Annotated[list[Text], AfterValidator(_check_list)]


class Row(BaseModel):
    """One row of a format; other columns than the declared ones are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: ClassVar[str]
    """What the format is called in reports."""
    column: ClassVar[str]
    """The column that tells the format."""
    needs_template: ClassVar[bool] = True

    def render(self, tokenizer: PreTrainedTokenizerBase) -> list[chat.Piece]:
        """The training text of this row, in pieces. Raises TemplateError or UnfaithfulError."""
        raise NotImplementedError


class TextRow(Row):
    """Finished training text, as in s1K_tokenized."""

    name = "text"
    column = "text"
    needs_template = False
    text: Text

    def render(self, tokenizer: PreTrainedTokenizerBase) -> list[chat.Piece]:
        """The text as it is."""
        return chat.split_text(self.text)


class Message(BaseModel):
    """One turn of a conversation; what the assistant thought before it may have either of two names."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "user", "assistant"]
    content: Text
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def _check_keys(self) -> "Message":
        for key, value in (self.model_extra or {}).items():
            if value is not None:
                raise PydanticCustomError(
                    "unsupported", "has {key}, which would be left out of the training text", {"key": repr(key)}
                )
        thoughts = {text for text in (self.reasoning_content, self.reasoning) if text and text.strip()}
        if len(thoughts) > 1:
            raise PydanticCustomError("two_thoughts", "has a reasoning and another reasoning_content")
        if thoughts and self.role != "assistant":
            raise PydanticCustomError("thought", "has reasoning, though it is not the assistant's")
        for text in thoughts:
            _check_text(text)
        return self

    def for_template(self) -> dict[str, str]:
        """The message under the names that chat templates read; a blank thought is none."""
        thought = self.reasoning_content or self.reasoning or ""
        message = {"role": self.role, "content": self.content}
        return {**message, "reasoning_content": thought} if thought.strip() else message


class MessagesRow(Row):
    """A conversation; every assistant turn of it is trained on, as it is."""

    name = "messages"
    column = "messages"
    messages: list[Message]
    tools: Absent = None
    chat_template_kwargs: Absent = None

    @model_validator(mode="after")
    def _check_turns(self) -> "MessagesRow":
        roles = [message.role for message in self.messages]
        if "system" in roles[1:]:
            raise PydanticCustomError("late_system", "only the first of the messages can be a system message")
        if "assistant" not in roles:
            raise PydanticCustomError("no_assistant", "there is no assistant turn among the messages")
        return self

    def render(self, tokenizer: PreTrainedTokenizerBase) -> list[chat.Piece]:
        """The conversation by the tokenizer's chat template."""
        return chat.render_conversation([message.for_template() for message in self.messages], tokenizer)


class S1K11Row(Row):
    """simplescaling/s1K-1.1: s1K's questions with DeepSeek-R1's traces (its Gemini traces are not used)."""

    name = "s1K-1.1"
    column = "deepseek_thinking_trajectory"
    question: Text
    deepseek_thinking_trajectory: Text
    deepseek_attempt: Text

    def render(self, tokenizer: PreTrainedTokenizerBase) -> list[chat.Piece]:
        """The example in s1's format."""
        return chat.render_s1(self.question, self.deepseek_thinking_trajectory, self.deepseek_attempt, tokenizer)


class S1KRow(Row):
    """simplescaling/s1K: a list of traces (of one, in the published data), joined by line breaks."""

    name = "s1K"
    column = "thinking_trajectories"
    question: Text
    thinking_trajectories: Texts
    attempt: Text

    def render(self, tokenizer: PreTrainedTokenizerBase) -> list[chat.Piece]:
        """The example in s1's format."""
        return chat.render_s1(self.question, "\n".join(self.thinking_trajectories), self.attempt, tokenizer)


FORMATS: tuple[type[Row], ...] = (TextRow, MessagesRow, S1K11Row, S1KRow)


def detect_format(row: dict[str, Any]) -> type[Row] | None:
    """The first format whose telling column this row has a value in."""
    return next((fmt for fmt in FORMATS if row.get(fmt.column) is not None), None)


def problems_of(error: ValidationError) -> list[str]:
    """What pydantic found wrong with a row, each with the field and what was found there."""
    return [_describe(detail) for detail in error.errors()]


def _describe(detail: ErrorDetails) -> str:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
    if not field:
        return detail["msg"]
    if detail["type"] == "missing":
        return f"field '{field}' is missing"
    message = detail["msg"].removeprefix("Input ")
    return f"field '{field}' {message}, found {describe(detail['input'])}"
