"""Configuration of training."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from s1jax.config import (
    STRICT,
    ComputationSection,
    Fraction,
    Integer,
    LoraSection,
    NonNegative,
    PathText,
    PlanSection,
    Positive,
    ProcessesSection,
    Remat,
)

BaseDtype = Literal["float32", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, config=STRICT)
class TrainedModelSection(ComputationSection):
    """The model to train."""

    lora: LoraSection = Field(default=LoraSection(), description="low-rank adapters")
    base_dtype: BaseDtype | None = Field(
        default=None, description="what the frozen weights beside adapters are kept in; null: bfloat16"
    )

    remat: Remat = Field(
        default="full",
        description="what the forward pass keeps: none = everything, dots = matmul outputs, heads = gate and queries, "
        "keys, values, gate = inputs of both blocks and gate projections, full = layer inputs only, "
        "offload = gate, and queries, keys, values and up projections in the host's memory",
    )
    remat_by_length: dict[Positive, Remat] | None = Field(
        default=None, description="another remat for rows of up to so many tokens; as {8192: heads, 16384: gate}"
    )


@dataclass(frozen=True, config=STRICT)
class DataSection:
    """The training examples and how they become rows."""

    path: PathText = Field(description="JSONL, JSON or Parquet file, or hub id of a data set")
    eval_path: PathText | None = Field(
        default=None, description="held-out examples, scored every training.eval_every steps"
    )
    block_size: Positive = Field(default=32_768, description="longest example, in tokens")
    overlong: Literal["error", "truncate", "drop"] = Field(
        default="error", description="what happens to an example longer than block_size"
    )
    packing: bool = Field(default=True, description="several examples in a row, kept apart by segment ids")
    max_row_length: Positive | None = Field(
        default=None, description="longest row that packing may fill, in tokens, if more than block_size"
    )
    shuffle: bool = Field(default=True, description="a new order each epoch")


@dataclass(frozen=True, config=STRICT)
class OptimizerSection:
    """AdamW; the defaults are s1's."""

    learning_rate: NonNegative = Field(default=1e-5, description="peak, after warm-up")
    warmup_ratio: Fraction = Field(default=0.05, description="share of the steps that warm up linearly from 0")
    weight_decay: NonNegative = Field(default=1e-4, description="not applied to biases and norms")
    beta1: Fraction = Field(default=0.9, description="decay of the first moment")
    beta2: Fraction = Field(default=0.95, description="decay of the second moment")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="global gradient norm is clipped to this"
    )
    moments_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="what both moments are kept in; bfloat16: two thirds of the state and of each checkpoint",
    )


@dataclass(frozen=True, config=STRICT)
class TrainingSection:
    """The run."""

    output_dir: PathText = Field(description="checkpoints, metrics.jsonl and at the end model/ are written here")
    num_epochs: Positive = Field(default=5, description="passes over the data")
    batch_size: Positive = Field(default=16, description="examples per optimiser step")
    gradient_accumulation_steps: Positive = Field(default=1, description="forward and backward passes per step")
    max_steps: Positive | None = Field(default=None, description="stop after this many steps; null: all epochs")
    loss_average: Literal["sample", "token"] = Field(
        default="sample", description="mean over the examples of each one's mean, or over all trained tokens"
    )
    seed: Integer = Field(default=0, description="order of the examples")
    eval_every: Positive = Field(default=50, description="steps between evaluations on data.eval_path")
    max_bad_steps: Positive = Field(
        default=5, description="steps in a row with a loss or gradient that is not finite before the run stops"
    )
    export_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="dtype of the weights in output_dir/model"
    )
    force: bool = Field(default=False, description="resume although keys changed that change the training")


@dataclass(frozen=True, config=STRICT)
class CheckpointSection:
    """Where a run can be resumed from."""

    every_steps: Positive | None = Field(
        default=100,
        description="steps between checkpoints; null: none by steps. The last step has none: model/ follows",
    )
    every_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="minutes between checkpoints, beside those of every_steps; null: none by the clock"
    )
    keep: Positive = Field(default=2, description="checkpoints kept, the newest ones")


@dataclass(frozen=True, config=STRICT)
class LoggingSection:
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = Field(default=False, description="write TensorBoard events to output_dir/tensorboard")
    wandb_project: str | None = Field(default=None, description="Weights & Biases project to report to")


@dataclass(frozen=True, config=STRICT)
class MeshSection(ProcessesSection):
    """How the devices are arranged for training; the sizes multiply to the number of devices."""

    data: Integer = Field(default=1, description="replicas; -1: all devices that are left")
    fsdp: Integer = Field(default=-1, description="shards of parameters and batch; -1: all devices that are left")
    tensor: Integer = Field(default=1, description="shards of heads, feed-forward and vocabulary")


@dataclass(frozen=True, config=STRICT)
class TrainPlanSection(PlanSection):
    """Compile for hardware that is not here, instead of training."""

    storage_gigabytes_per_second: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="that each host writes, to count checkpoints and the export; null: not counted"
    )
    num_examples: Positive = Field(default=1000, description="where data.path cannot be read: so many examples,")
    mean_length: Positive | None = Field(
        default=None, description="of this mean length in tokens, log-normally spread; null: all of data.block_size"
    )
    max_length: Positive | None = Field(default=None, description="the longest of them; null: data.block_size")


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """python train.py: supervised fine-tuning on reasoning traces."""

    model: TrainedModelSection
    data: DataSection
    training: TrainingSection
    optimizer: OptimizerSection = Field(default=OptimizerSection(), description="AdamW")
    checkpoint: CheckpointSection = Field(default=CheckpointSection(), description="checkpoints")
    logging: LoggingSection = Field(default=LoggingSection(), description="metrics")
    mesh: MeshSection = Field(default=MeshSection(), description="device mesh")
    plan: TrainPlanSection = Field(default=TrainPlanSection(), description="planning")
