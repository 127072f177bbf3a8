"""The configuration of `python -m s1jax.curate`: the sections of the stages that ask nobody, and the root of all."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from s1jax.config import STRICT, NonNegative, PathText, Positive, SeparatedTexts, WholeNumber
from s1jax.curation.sections import DistillSection, DomainsSection, GradeSection, StudentSection


def _check_student(name: str) -> str:
    # The others' files and lines have these names.
    if not re.fullmatch(r"[\w-]+", name) or name in ("teacher", "judge", "domains"):
        raise ValueError("a student's name has letters, digits, _ and -, and is not teacher, judge or domains")
    return name


@dataclass(frozen=True, config=STRICT)
class SourceSection:
    """One source of questions, and which of its columns are what."""

    path: PathText = Field(description="JSONL, JSON or Parquet file, or hub id of a data set")
    subset: str | None = Field(default=None, description="of a hub data set: its configuration")
    split: str = Field(default="train", description="of a hub data set")
    question: str = Field(default="question", description="column of the question")
    answer: str | None = Field(default=None, description="column of the reference answer; null: there are none")
    answer_after: str | None = Field(
        default=None, description="the reference is what follows the last of these in the column; GSM8K: '####'"
    )
    domain: str | None = Field(default=None, description="column of the domain; null: unknown, or ask in domains")
    metadata: Annotated[tuple[str, ...], SeparatedTexts] = Field(default=(), description="further columns to keep")
    limit: Positive | None = Field(default=None, description="so many of the first rows; null: all")


@dataclass(frozen=True, config=STRICT)
class EvaluationSetSection:
    """Questions that none of the sources' may resemble."""

    path: PathText = Field(description="JSONL, JSON or Parquet file, or hub id of a data set")
    subset: str | None = Field(default=None, description="of a hub data set: its configuration")
    split: str = Field(default="test", description="of a hub data set")
    question: str = Field(default="question", description="column of the question")


@dataclass(frozen=True, config=STRICT)
class FilterSection:
    """What is dropped before the selection."""

    asy_sources: Annotated[tuple[str, ...], SeparatedTexts] = Field(
        default=(), description="sources whose questions may contain [asy]"
    )


@dataclass(frozen=True, config=STRICT)
class PreselectionSection:
    """Which questions of a source are selected before any is drawn."""

    teacher_right: bool = Field(default=True, description="the teacher's answer is graded right")
    trace_longer_than: WholeNumber = Field(default=0, description="and its trace is longer, in select.tokenizer's unit")


@dataclass(frozen=True, config=STRICT)
class BenchmarkSection:
    """A set of problems whose domains the later draws follow."""

    path: PathText = Field(description="JSONL, JSON or Parquet file, or hub id of a data set; a row is a problem")
    subset: str | None = Field(default=None, description="of a hub data set: its configuration")
    split: str = Field(default="test", description="of a hub data set")
    domain: str = Field(default="domain", description="column of the domain")
    weight: NonNegative = Field(default=1.0, description="what all its problems weigh together")


@dataclass(frozen=True, config=STRICT)
class SelectSection:
    """s1's algorithm 1."""

    size: Positive = Field(default=1000, description="questions to select")
    seed: WholeNumber = Field(default=0, description="of all draws")
    tokenizer: PathText | None = Field(
        default=None, description="directory or hub id; lengths of traces are in its tokens. null: in words"
    )
    preselect: dict[str, PreselectionSection] = Field(default={}, description="by name of the source")
    preselected_stay: bool = Field(
        default=False, description="preselected questions keep their ranks and can be drawn again, as in s1's notebook"
    )
    benchmarks: dict[str, BenchmarkSection] = Field(
        default={}, description="their domains weight the draws of domains from uniform_until on; none: all are uniform"
    )
    uniform_until: WholeNumber = Field(default=700, description="domains are drawn uniformly below so many selected")


@dataclass(frozen=True, config=STRICT)
class FormatSection:
    """The training files."""

    type: Literal["jsonl", "parquet"] = Field(default="jsonl", description="of train and validation")
    validation: WholeNumber = Field(default=0, description="questions held out in the file validation")
    seed: WholeNumber = Field(default=0, description="order of the rows, and which are held out")


@dataclass(frozen=True, config=STRICT)
class CurateConfig:
    """python -m s1jax.curate: from sources of questions to a small training set with reasoning traces."""

    output_dir: PathText = Field(description="the run directory: all stages read and write here")
    sources: dict[str, SourceSection] = Field(description="by name, in the order in which duplicates are resolved")
    evaluation_sets: dict[str, EvaluationSetSection] = Field(
        default={}, description="by name; a question that shares 8 words in a row with one of theirs is dropped"
    )
    distill: DistillSection = Field(default=DistillSection(), description="the teacher")
    students: dict[Annotated[str, AfterValidator(_check_student)], StudentSection] = Field(
        default={}, description="by name; a question that one of them solves is dropped"
    )
    grade: GradeSection = Field(default=GradeSection(), description="grading")
    filter: FilterSection = Field(default=FilterSection(), description="filtering")
    domains: DomainsSection = Field(default=DomainsSection(), description="classification")
    select: SelectSection = Field(default=SelectSection(), description="selection")
    format: FormatSection = Field(default=FormatSection(), description="training files")
