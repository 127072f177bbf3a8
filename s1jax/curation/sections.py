"""The sections of the configuration for stages that ask models."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from s1jax.config import STRICT, BudgetSection, DecodingMeshSection, NonNegative, PathText, Positive, WholeNumber

Seconds = Annotated[float, Field(gt=0)]
BOXED = "\n\nPut your final answer within \\boxed{}."


@dataclass(frozen=True, config=STRICT)
class EndpointSection:
    """A model behind an OpenAI-compatible API, and what asking it may cost."""

    base_url: str | None = Field(default=None, description="as https://api.openai.com/v1; null: no endpoint")
    model: str | None = Field(default=None, description="the endpoint's name of the model")
    api_key_env: str = Field(default="OPENAI_API_KEY", description="name of the environment variable with the key")
    max_tokens: Positive = Field(default=32_768, description="longest answer in tokens, reasoning included")
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="what the endpoint calls it (OpenAI's reasoning models: the latter)"
    )
    extra_body: dict[str, Any] = Field(default={}, description="more fields of each request, as temperature")
    concurrency: Positive = Field(default=16, description="questions under way at once")
    timeout: Seconds = Field(default=1800.0, description="seconds until a request without a whole answer is given up")
    max_retries: WholeNumber = Field(
        default=8, description="further tries of a question after overload, server errors, timeouts, lost connections"
    )
    max_rubbish_retries: WholeNumber = Field(default=2, description="further tries after an answer that is unusable")
    backoff: NonNegative = Field(default=1.0, description="seconds before the first further try, doubled for each next")
    max_backoff: NonNegative = Field(default=60.0, description="longest of these waits, in seconds")
    max_retry_after: NonNegative = Field(
        default=3600.0, description="the run stops if the endpoint asks for a longer wait, in seconds"
    )
    retry_failed: bool = Field(default=False, description="ask the questions again that failed in an earlier run")
    price_in: NonNegative = Field(default=0.0, description="price of a million prompt tokens")
    price_out: NonNegative = Field(default=0.0, description="price of a million answer tokens")
    max_cost: NonNegative | None = Field(default=None, description="money that the whole stage may cost")
    max_total_tokens: Positive | None = Field(default=None, description="tokens that the whole stage may cost")


@dataclass(frozen=True, config=STRICT)
class DistillSection:
    """The teacher."""

    endpoint: EndpointSection = Field(default=EndpointSection(), description="where it is asked")
    instruction: str = Field(default=BOXED, description="appended to each question; not part of the training rows")


@dataclass(frozen=True, config=STRICT)
class StudentSection:
    """A student, either at endpoint.base_url or the model at path."""

    endpoint: EndpointSection = Field(default=EndpointSection(), description="where it is asked")
    path: PathText | None = Field(
        default=None, description="model directory or hub id, to compute answers here (greedy)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="dtype of the computation")
    budget: BudgetSection = Field(
        default=BudgetSection(profile="none", max_answer_tokens=4096), description="with path: length of the answers"
    )
    batch_size: Positive = Field(default=8, description="with path: rows decoded at once")
    mesh: DecodingMeshSection = Field(default=DecodingMeshSection(), description="with path: device mesh")
    instruction: str = Field(default=BOXED, description="appended to each question")


@dataclass(frozen=True, config=STRICT)
class GradeSection:
    """How answers are graded."""

    method: Literal["math-verify", "judge"] = Field(default="math-verify", description="what grades")
    grading_seconds: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="an answer that takes math-verify longer is ungraded"
    )
    endpoint: EndpointSection = Field(default=EndpointSection(), description="the judge")


@dataclass(frozen=True, config=STRICT)
class DomainsSection:
    """The model that classifies."""

    endpoint: EndpointSection = Field(default=EndpointSection(), description="where it is asked")
    ask_about: Literal["filtered", "collected"] = Field(
        default="filtered", description="what filter left, or, for a benchmark's domains, all that collect found"
    )
