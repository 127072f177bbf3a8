"""Reads, checks and tokenises a training set: from a path to token ids with a loss mask each.

All that is wrong with the data is reported at once, with its place, before anything starts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from s1jax.chat_template import TemplateError
from s1jax.data import chat
from s1jax.data.formats import FORMATS, Row, detect_format, problems_of
from s1jax.data.sources import read_source
from s1jax.jsonl import InputError, Problem, Source
from s1jax.tokenizer import encode_all

Overlong = Literal["error", "truncate", "drop"]

# Texts per call of the tokenizer: enough to keep its threads busy, few enough that the lists of Python
# integers it returns stay small next to the arrays made of them.
TOKENIZER_BATCH = 256
PERCENTILES = (10, 50, 90, 99)


@dataclass(frozen=True, eq=False)
class Example:
    """One training example.

    `loss_mask[i]` says that token i is trained on, i.e. predicted from the tokens before it. Index 0 never
    is; at least one token of every example is.
    """

    input_ids: Int32[np.ndarray, " length"]
    loss_mask: Bool[np.ndarray, " length"]


@dataclass(frozen=True)
class Summary:
    """Figures on a training set; `str()` of it is a report of a few lines. Lengths are in tokens."""

    path: str
    format: str
    block_size: int
    rows: int
    examples: int
    truncated: int
    dropped: int
    tokens: int
    trained_tokens: int
    lengths: dict[str, int]

    def __str__(self) -> str:
        share = self.trained_tokens / self.tokens
        lengths = ", ".join(f"{name} {value:,}" for name, value in self.lengths.items())
        return "\n".join(
            [
                f"{self.path}: {self.rows:,} rows, format {self.format}",
                f"  examples  {self.examples:,} ({self.truncated:,} truncated, {self.dropped:,} dropped; "
                f"block_size {self.block_size:,})",
                f"  tokens    {self.tokens:,}, trained on {self.trained_tokens:,} of them ({share:.1%})",
                f"  length    {lengths}",
            ]
        )


@dataclass(frozen=True)
class Dataset:
    """A tokenised training set, in the order of its rows."""

    path: str
    format: str
    block_size: int
    examples: list[Example]
    rows: int
    truncated: int
    dropped: int

    @property
    def summary(self) -> Summary:
        """Counts and the distribution of lengths, after truncation and dropping."""
        lengths = np.array([example.input_ids.size for example in self.examples])
        percentiles = {f"p{p}": round(np.percentile(lengths, p)) for p in PERCENTILES}
        return Summary(
            path=self.path,
            format=self.format,
            block_size=self.block_size,
            rows=self.rows,
            examples=len(self.examples),
            truncated=self.truncated,
            dropped=self.dropped,
            tokens=int(lengths.sum()),
            trained_tokens=sum(int(example.loss_mask.sum()) for example in self.examples),
            lengths={
                "min": int(lengths.min()),
                **percentiles,
                "max": int(lengths.max()),
                "mean": round(lengths.mean()),
            },
        )


def load_examples(path: str, tokenizer: PreTrainedTokenizerBase, *, block_size: int, overlong: Overlong) -> Dataset:
    """Read, check and tokenise a training set.

    Args:
        path: a .jsonl, .json or .parquet file, a directory, or a hub data set id (see `sources.read_source`).
            Its rows are all of one format of `formats.FORMATS`, that of its first row with a known one.
        tokenizer: a fast ChatML tokenizer, with a chat template unless the rows are finished text. It adds no
            special tokens: the text has all of them.
        block_size: most tokens in an example.
        overlong: what becomes of longer ones: "error" reports them, "truncate" cuts them (an example left
            with no trained token is reported), "drop" leaves them out. The counts are in the result.

    Raises:
        InputError: with all problems of all rows, by line or row; or if no example is left.
        ValueError: if the tokenizer cannot be used for s1's text.
    """
    source = read_source(path)
    chat.check_chatml(tokenizer)
    fmt = _find_format(source)
    if fmt.needs_template and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer has no chat template, which rows of format {fmt.name} are rendered with")

    problems = list(source.problems)
    rendered: dict[int, list[chat.Piece]] = {}
    for number, row in source.rows:
        try:
            rendered[number] = fmt.model_validate(row).render(tokenizer)
        except ValidationError as error:
            problems.extend(Problem(number, text) for text in problems_of(error))
        except (TemplateError, chat.UnfaithfulError) as error:
            problems.append(Problem(number, str(error)))

    examples = []
    truncated = dropped = 0
    for (number, pieces), (ids, mask) in zip(rendered.items(), _tokenize([*rendered.values()], tokenizer), strict=True):
        is_overlong = ids.size > block_size
        problem = _check_pieces(pieces, ids, mask, tokenizer) or _check_length(mask, block_size, overlong)
        if problem:
            problems.append(Problem(number, problem))
        elif is_overlong and overlong == "drop":
            dropped += 1
        else:
            truncated += is_overlong
            examples.append(Example(ids[:block_size], mask[:block_size]))

    if problems:
        raise source.error(problems)
    if not examples:
        raise InputError(f"{path}: all {dropped} rows are over block_size={block_size} tokens, none is left")
    return Dataset(path, fmt.name, block_size, examples, len(source.rows), truncated, dropped)


def _find_format(source: Source) -> type[Row]:
    for _, row in source.rows:
        if fmt := detect_format(row):
            return fmt
    problems = list(source.problems)
    if source.rows:
        number, row = source.rows[0]
        known = ", ".join(f"'{fmt.column}' ({fmt.name})" for fmt in FORMATS)
        found = ", ".join(repr(column) for column in row) or "none"
        problems.append(Problem(number, f"no known format: expected a column {known}; found {found:.300}"))
    raise source.error(problems)


_Tokens = tuple[Int32[np.ndarray, " length"], Bool[np.ndarray, " length"]]


def _tokenize(rendered: list[list[chat.Piece]], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Tokens]:
    """Ids and loss mask of each text, its pieces tokenised one by one, as a prompt and its continuation are."""
    for start in range(0, len(rendered), TOKENIZER_BATCH):
        batch = rendered[start : start + TOKENIZER_BATCH]
        texts = [piece.text for pieces in batch for piece in pieces]
        encoded = iter(encode_all(texts, tokenizer)["input_ids"])
        for pieces in batch:
            parts = [next(encoded) for _ in pieces]
            trained = np.repeat([piece.trained for piece in pieces], [len(part) for part in parts])
            yield np.array([i for part in parts for i in part], np.int32), trained


def _check_pieces(
    pieces: list[chat.Piece],
    ids: Int32[np.ndarray, " length"],
    mask: Bool[np.ndarray, " length"],
    tokenizer: PreTrainedTokenizerBase,
) -> str | None:
    text = "".join(piece.text for piece in pieces)
    if chat.RESPONSE_MARKER not in text:
        return f"nothing to train on: there is no {chat.RESPONSE_MARKER!r} in the text"
    # Tokenised as a whole, the marker's line break would be one token with those after it, and so it is in texts that
    # models were trained on before.
    if any(piece.trained and re.match(r"\s*[\r\n]", piece.text) for piece in pieces):
        return "an assistant turn begins with a line break, so its start cannot be told: strip its content"
    if not mask.any():
        return "nothing to train on: no text follows the start of the assistant turn"
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = "".join(backend.normalizer.normalize_str(piece.text) for piece in pieces)
    if backend.decode(ids.tolist(), skip_special_tokens=False) != text:
        return "the tokenizer does not give the text back that it is given: it does not know all of its characters"
    return None


def _check_length(mask: Bool[np.ndarray, " length"], block_size: int, overlong: Overlong) -> str | None:
    if overlong == "error" and mask.size > block_size:
        return f"{mask.size} tokens are over block_size={block_size} (overlong: truncate or drop accepts that)"
    if overlong == "truncate" and not mask[:block_size].any():
        return f"nothing to train on within block_size={block_size}: the prompt takes {np.argmax(mask)} tokens"
    return None
