"""Typed configuration: every command has one root dataclass, whose sections are shared between commands.

The values come from YAML files and `section.key=value` words (`config_reader`) and are checked by pydantic.
"""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from s1jax.paths import any_path

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

# Strict: YAML's `yes` is not the number 1.
Integer = Annotated[int, Field(strict=True)]
Positive = Annotated[int, Field(strict=True, ge=1)]
WholeNumber = Annotated[int, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Limit = WholeNumber | Literal["auto"]
"""Of thinking tokens; auto: what the context leaves."""


def _check_path(text: str) -> str:
    any_path(text)
    return text


PathText = Annotated[str, AfterValidator(_check_path)]
"""A local path, gs:// or s3://, or the name of something on the hub; for `paths.any_path`."""

Implementation = Literal["auto", "plain", "chunked", "blocks", "kernel", "cudnn", "splash"]
"""Of attention; `model.attention.attention` says what each is."""
Quantisation = Literal["int8", "int4"]
CacheDtype = Literal["int8"]
Remat = Literal["none", "dots", "offload", "heads", "gate", "full"]


@dataclass(frozen=True, config=STRICT)
class ComputationSection:
    """A model and how it is computed."""

    path: PathText = Field(description="model directory, or hub id (owner/name)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="dtype of the computation")
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="dtype of the parameters in memory; null: as the command needs (training: float32)"
    )
    attention: Implementation = Field(default="auto", description="attention implementation")


Adapter = Annotated[
    PathText | None, Field(description="directory or hub id of an adapter in PEFT's format, merged into the model")
]


@dataclass(frozen=True, config=STRICT)
class ModelSection(ComputationSection):
    """The model to decode with."""

    adapter: Adapter = None
    weights: Quantisation | None = Field(
        default=None, description="what weights are made into while they are read; null: as they are"
    )


def _split(value: Any) -> Any:
    """`a.jsonl,aime24` on the command line is a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


SeparatedTexts = BeforeValidator(_split)
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, config=STRICT)
class LoraSection:
    """Low-rank adapters, trained in place of the weights that they are added to."""

    rank: Positive | None = Field(default=None, description="of each adapter; null: none, all weights are trained")
    alpha: Annotated[float, Field(gt=0)] = Field(default=32.0, description="adapters are scaled by alpha / rank")
    targets: Annotated[tuple[LoraTarget, ...], SeparatedTexts, Field(min_length=1)] = Field(
        default=get_args(LoraTarget), description="projections that have one; as q_proj,v_proj"
    )


@dataclass(frozen=True, config=STRICT)
class ProcessesSection:
    """Where the other processes of a run are."""

    coordinator: str | None = Field(default=None, description="host:port of process 0, where no launcher tells it")
    num_processes: Positive | None = Field(default=None, description="how many there are, where no launcher tells")
    process_id: WholeNumber | None = Field(default=None, description="which one this is, from 0, likewise")


@dataclass(frozen=True, config=STRICT)
class DecodingMeshSection(ProcessesSection):
    """How the devices are arranged for decoding; sizes that are null are chosen."""

    data: Integer | None = Field(default=None, description="copies of the model; -1: all devices that are left")
    fsdp: Integer | None = Field(
        default=None, description="shards of parameters, gathered at each step, and of rows; -1: all that are left"
    )
    tensor: Integer | None = Field(default=None, description="shards of heads, feed-forward and vocabulary")
    copies: Literal["hosts"] | None = Field(
        default=None,
        description="hosts: a copy of the model for each process, one a host, which takes its share of the requests; "
        "null: one model over all processes",
    )


@dataclass(frozen=True, config=STRICT)
class PlanSection:
    """Compile for hardware that is not here, instead of running."""

    target: str | None = Field(default=None, description="h100:2x8, tpu:v5p:2x2x4, ...; --plan TARGET is the same")
    output: PathText | None = Field(default=None, description="JSON file to write")
    efficiency: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.45, description="share of the peak that matrix products reach"
    )
    search: bool = Field(
        default=False,
        description="rank meshes, and for training remat policies, accumulation and, if need be, shorter blocks, for "
        "decoding rows and dtypes",
    )
    price_per_device_hour: NonNegative | None = Field(default=None, description="to say what the run costs")


@dataclass(frozen=True, config=STRICT)
class EvaluatePlanSection(PlanSection):
    """Compile for hardware that is not here, instead of evaluating."""

    questions: Positive | None = Field(default=None, description="of all tasks; null: as many as those have, or limit")
    lengths: str = Field(
        default="lognormal:4000:32000",
        description="tokens that the longest run generates, as lognormal:MEAN:MAX, or an earlier samples.jsonl",
    )
    prompt_length: Positive = Field(default=200, description="tokens of a question")
    answer_tokens: Positive = Field(default=500, description="tokens after the thinking, of every run")


@dataclass(frozen=True, config=STRICT)
class ScoreConfig:
    """python decode.py score: log-probabilities of given texts."""

    model: ModelSection
    input: PathText = Field(description="JSONL; a line has text or input_ids, and optionally id")
    output: PathText = Field(description="JSONL to write; if it exists, the run goes on after its last whole line")
    batch_size: Positive = Field(default=8, description="rows computed at once")
    max_length: Positive | None = Field(
        default=None, description="longest row allowed, in tokens; null: the model's context"
    )
    mesh: DecodingMeshSection = Field(default=DecodingMeshSection(), description="device mesh")


@dataclass(frozen=True, config=STRICT)
class QuantisedModelSection:
    """The model to quantise."""

    path: PathText = Field(description="model directory, or hub id (owner/name)")
    weights: Quantisation = Field(description="what its weights are made into")
    adapter: Adapter = None


@dataclass(frozen=True, config=STRICT)
class QuantiseConfig:
    """python decode.py quantise: a directory of the model with weights of few bits, to be read as model.path."""

    model: QuantisedModelSection
    output: PathText = Field(description="directory to write")


@dataclass(frozen=True, config=STRICT)
class BudgetSection:
    """How long a row thinks and answers; a prompt's own values win."""

    profile: PathText = Field(default="s1", description="delimiters: s1, qwen3, deepseek-r1, none, or a YAML file")
    max_thinking_tokens: Limit | None = Field(
        default="auto", description="thinking ends after so many; auto: what the context leaves; null: no bound"
    )
    min_thinking_tokens: WholeNumber = Field(default=0, description="an earlier end of thinking is drawn again")
    num_ignore: WholeNumber = Field(default=0, description="so many ends of thinking are replaced by the wait text")
    wait: str | tuple[str, ...] = Field(default="Wait", description="the wait text, or several to take in turn")
    max_answer_tokens: WholeNumber | None = Field(default=1024, description="the answer ends after so many; null: eos")


@dataclass(frozen=True, config=STRICT)
class SamplerSection:
    """What tokens are drawn from."""

    temperature: NonNegative = Field(default=0.0, description="0 is greedy")
    top_p: Fraction = Field(default=1.0, description="keep the likeliest tokens that together have this probability")
    top_k: Positive | None = Field(default=None, description="keep so many of the likeliest tokens")
    min_p: Fraction = Field(default=0.0, description="keep tokens with this share of the likeliest one's probability")


@dataclass(frozen=True, config=STRICT)
class SamplingSection(SamplerSection):
    """How tokens are drawn."""

    seed: WholeNumber = Field(default=0, description="of all draws; a row's depend on nothing else but its position")
    num_samples: Positive = Field(default=1, description="results for each prompt")


BatchSize = Annotated[
    Positive | Literal["auto"],
    Field(description="rows decoded at once; auto: 64 for each shard of the batch, on a CPU 8, if there are so many"),
]


@dataclass(frozen=True, config=STRICT)
class CacheDtypeSection:
    """How keys and values of past tokens are kept."""

    dtype: CacheDtype | None = Field(
        default=None, description="int8: with a scale for each token and head; null: in the computation's dtype"
    )


@dataclass(frozen=True, config=STRICT)
class CacheSection(CacheDtypeSection):
    """The keys and values of past tokens, in pages that rows are given as they grow."""

    tokens: Positive | None = Field(
        default=None,
        description="of all rows together; null: of every row as many as it can have, or what there is memory for",
    )


@dataclass(frozen=True, config=STRICT)
class GenerateConfig:
    """python decode.py generate: answers with a thinking budget."""

    model: ModelSection
    prompts: PathText | None = Field(
        default=None,
        description="JSONL; a line has prompt, messages or input_ids, and optionally id and budget keys of its own",
    )
    prompt: str | None = Field(default=None, description="one question, instead of prompts")
    output: PathText | None = Field(
        default=None, description="JSONL to write, which a run started again goes on with; null: to the terminal"
    )
    chat_template: bool = Field(default=True, description="wrap a prompt as the user's turn of a chat")
    budget: BudgetSection = Field(default=BudgetSection(), description="thinking budget")
    max_total_tokens: Positive | None = Field(
        default=None, description="prompt and output together; null: the model's context"
    )
    sampling: SamplingSection = Field(default=SamplingSection(), description="sampling")
    batch_size: BatchSize = "auto"
    cache: CacheSection = Field(default=CacheSection(), description="keys and values of past tokens")
    logprobs: bool = Field(default=False, description="write each output token's log-probability too")
    mesh: DecodingMeshSection = Field(default=DecodingMeshSection(), description="device mesh")
    plan: PlanSection = Field(default=PlanSection(), description="planning")


def _split_numbers(value: Any) -> Any:
    """`1,8,auto` on the command line is a list of numbers and words; 000 is no number, but the rest of 1,000."""
    if isinstance(value, int):
        return [value]
    parts = _split(value)
    if isinstance(value, str):
        return [int(part) if re.fullmatch("0|[1-9][0-9]{0,18}", part) else part for part in parts]
    return parts


LOG_NORMAL = r"^lognormal:[1-9]\d*:[1-9]\d*$"
"""How lengths are given by their mean and their greatest."""
Baseline = Literal["token_conditional", "step_conditional", "rejection"]
SeparatedNumbers = BeforeValidator(_split_numbers)


@dataclass(frozen=True, config=STRICT)
class SweepSection:
    """The runs of an evaluation, each over all questions."""

    max_thinking_tokens: Annotated[tuple[Limit, ...], SeparatedNumbers] = Field(
        default=(), description="a run for each of these budgets; as 0,256,auto"
    )
    num_ignore: Annotated[tuple[WholeNumber, ...], SeparatedNumbers] = Field(
        default=(), description="a run for each of these counts of waits, within budget.max_thinking_tokens"
    )
    wait: Annotated[tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = Field(
        default=("Wait",), description="a run for each of these wait texts and each count"
    )
    baselines: Annotated[tuple[Baseline, ...], SeparatedTexts] = Field(
        default=(), description="the paper's other ways to keep to each number in sweep.max_thinking_tokens"
    )
    max_tries: Positive = Field(default=10, description="of rejection sampling, for one question and budget")
    share: bool = Field(
        default=True, description="decode what runs of a question have in common once; false: each alone, for checking"
    )


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """python decode.py evaluate: accuracy over budgets and waits, graded, with a report."""

    model: ModelSection
    tasks: Annotated[tuple[PathText, ...], SeparatedTexts] = Field(
        description="files with problem and answer, or aime24, aime25, math500, gpqa_diamond, gsm8k; as a.jsonl,aime24"
    )
    output_dir: PathText = Field(description="samples.jsonl, summary.json and report.html are written here")
    limit: Positive | None = Field(default=None, description="so many questions of each task; null: all")
    grading_seconds: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="an answer that takes math-verify longer is counted as ungraded"
    )
    chat_template: bool = Field(default=True, description="wrap a question as the user's turn of a chat")
    budget: BudgetSection = Field(default=BudgetSection(), description="thinking budget")
    max_total_tokens: Positive | None = Field(
        default=None, description="prompt and output together; null: the model's context"
    )
    sweep: SweepSection = Field(default=SweepSection(), description="runs")
    sampling: SamplingSection = Field(default=SamplingSection(), description="sampling")
    batch_size: BatchSize = "auto"
    cache: CacheSection = Field(default=CacheSection(), description="keys and values of past tokens")
    mesh: DecodingMeshSection = Field(default=DecodingMeshSection(), description="device mesh")
    plan: EvaluatePlanSection = Field(default=EvaluatePlanSection(), description="planning")


@dataclass(frozen=True, config=STRICT)
class EffortsSection:
    """The thinking tokens that a request's `reasoning_effort` stands for; auto: what the context leaves."""

    none: Limit = Field(default=0, description="of reasoning_effort none")
    minimal: Limit = Field(default=512, description="of minimal")
    low: Limit = Field(default=2048, description="of low")
    medium: Limit = Field(default=8192, description="of medium")
    high: Limit = Field(default="auto", description="of high")
    xhigh: Limit = Field(default="auto", description="of xhigh")


@dataclass(frozen=True, config=STRICT)
class ServerSection:
    """Where a server listens, and what bounds it."""

    host: str = Field(
        default="127.0.0.1", description="address; another than loopback needs a key in the environment: S1JAX_API_KEY"
    )
    port: Annotated[int, Field(strict=True, ge=0, le=65535)] = Field(default=8000, description="0: any that is free")
    name: str | None = Field(default=None, description="of the model in requests; null: the last part of model.path")
    steps: Positive | None = Field(
        default=None, description="decode steps between two parts of a streamed answer; null: 8, on a CPU 2"
    )
    max_waiting: Positive = Field(default=256, description="answers that may wait for a row; more are refused (429)")
    max_samples: Positive = Field(default=16, description="answers of one request")
    max_body_bytes: Positive = Field(default=4_194_304, description="of one request")
    max_connections: Positive = Field(default=1024, description="at once; others are refused (503)")
    receive_seconds: Annotated[float, Field(gt=0)] = Field(default=30.0, description="in which a request has to come")
    request_seconds: Annotated[float, Field(gt=0)] = Field(default=3600.0, description="that a request may take")
    drain_seconds: Annotated[float, Field(gt=0)] = Field(
        default=60.0, description="that answers at work have to finish after SIGTERM"
    )
    log_prompts: bool = Field(default=False, description="write what is asked into the log too")


@dataclass(frozen=True, config=STRICT)
class ServeConfig:
    """python decode.py serve: an OpenAI-style server, with thinking budgets in each request."""

    model: ModelSection
    server: ServerSection = Field(default=ServerSection(), description="server")
    budget: BudgetSection = Field(default=BudgetSection(), description="thinking budget where a request has none")
    efforts: EffortsSection = Field(default=EffortsSection(), description="thinking tokens of each reasoning_effort")
    max_total_tokens: Positive | None = Field(
        default=None, description="prompt and output together, of any request; null: the model's context"
    )
    sampling: SamplerSection = Field(default=SamplerSection(), description="sampling where a request says nothing")
    batch_size: BatchSize = "auto"
    cache: CacheSection = Field(default=CacheSection(), description="keys and values of past tokens")
    mesh: DecodingMeshSection = Field(default=DecodingMeshSection(), description="device mesh")


@dataclass(frozen=True, config=STRICT)
class BenchmarkSection:
    """What decoding is measured on."""

    batch_sizes: Annotated[tuple[Positive, ...], SeparatedNumbers] = Field(
        default=(1, 8, 32), description="rows decoded at once, each measured in turn; as 1,8,32"
    )
    prompt_length: Positive = Field(default=128, description="tokens of each prompt")
    new_tokens: Positive = Field(default=128, description="tokens generated in each row")
    repeats: Positive = Field(default=3, description="runs of each measurement, of which the median counts")
    requests: Positive | None = Field(
        default=None, description="so many requests of various lengths as well, with prefill, at each batch size"
    )
    lengths: Annotated[str, Field(pattern=LOG_NORMAL)] = Field(
        default="lognormal:256:2048", description="tokens that requests generate, as lognormal:MEAN:MAX"
    )
    rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="requests that come in a second, at random times; null: all at once"
    )
    output: PathText | None = Field(default=None, description="JSON file to write; requests: a PNG beside it")


@dataclass(frozen=True, config=STRICT)
class BenchmarkConfig:
    """python decode.py benchmark: speed of prefill and decoding; a config.json alone is enough."""

    model: ModelSection
    benchmark: BenchmarkSection = Field(default=BenchmarkSection(), description="measurements")
    cache: CacheDtypeSection = Field(default=CacheDtypeSection(), description="keys and values of past tokens")
    mesh: DecodingMeshSection = Field(default=DecodingMeshSection(), description="device mesh")
