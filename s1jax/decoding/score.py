"""Scoring: the log-probability that the model gives to each token of given texts."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from s1jax.config import ScoreConfig
from s1jax.decoding.finite import NonFiniteError
from s1jax.decoding.hosts import Row, SharedOutput, same_command, start_hosts, to_host
from s1jax.jsonl import InputError, Problem, read_jsonl
from s1jax.mesh import constrain, divisible_rows
from s1jax.model.config import QwenConfig
from s1jax.model.fingerprint import model_fingerprint
from s1jax.model.hf_files import resolve_model
from s1jax.model.load import LoadedModel, decoding_model, load_model
from s1jax.model.qwen import Params, Qwen
from s1jax.model.token_logprobs import token_logprobs
from s1jax.paths import AnyPath, any_path
from s1jax.processes import together
from s1jax.progress import progress
from s1jax.resume import keep_settings, settings_of
from s1jax.tokenizer import encode, load_tokenizer

_BATCHES_PER_WINDOW = 16
"""Rows are sorted by length within a window of this many batches; a window is written when it is whole."""
_SHORTEST_BUCKET = 64
_FREE_TO_CHANGE = ("input", "output", "batch_size", "mesh")
"""Keys that a stopped run may go on with other values of: the results do not depend on them."""


@dataclass(frozen=True)
class ScoredRow:
    """A row to be scored."""

    id: Any
    input_ids: list[int]


def score(config: ScoreConfig) -> None:
    """Score every row of `config.input` and write `config.output`, in the same order.

    Raises InputError listing the rows that cannot be scored, before anything is computed; InUseError and OSError.
    """
    hosts = start_hosts(config.mesh)
    rows = together(lambda: _rows(config))
    same_command(config, hosts, rows)
    place = {repr(row.id): number for number, row in enumerate(rows)}

    def key(row: Row) -> int:
        return place[repr(row["id"])]

    with SharedOutput(any_path(config.output), hosts) as output:

        def resume() -> list[int]:
            beside = output.path.with_name(output.path.name + ".config.json")
            settings = settings_of(config, _FREE_TO_CHANGE, model_fingerprint(config.model))
            keep_settings(settings, output.path, beside, save=hosts.processes.index == 0)
            numbers = []
            for row in output.rows():
                number = place.get(repr(row.get("id")))
                if number is None or rows[number].input_ids != row.get("input_ids"):
                    raise InputError(
                        f"{output.path}: it has id {row.get('id')!r}, which is not that row of {config.input}: "
                        "move it away"
                    )
                numbers.append(number)
            return numbers

        done = set(hosts.told(resume))
        mine = [number for number in range(len(rows)) if hosts.deals(number)]
        window = config.batch_size * _BATCHES_PER_WINDOW
        windows = [mine[start : start + window] for start in range(0, len(mine), window)]
        left = sum(number not in done for number in mine)
        loaded = together(lambda: load_model(config.model, config.mesh)) if left else None
        with progress("row", left, shown=hosts.writes) as bar:
            for chosen in windows:
                if loaded is None or done.issuperset(chosen):
                    continue
                # All of a window, so that what is computed does not depend on where an earlier run was stopped.
                names = [f"{config.input}: id {rows[i].id!r}" for i in chosen]
                results = score_rows(loaded, [rows[i].input_ids for i in chosen], config.batch_size, names)
                lines = [
                    {"id": rows[number].id, **result}
                    for number, result in zip(chosen, results, strict=True)
                    if number not in done
                ]
                output.append(lines)
                bar.update(len(lines))
        with output.merged(lambda written: len(rows) - len(set(map(key, written))), key, order=key):
            pass


def _rows(config: ScoreConfig) -> list[ScoredRow]:
    directory = resolve_model(config.model.path)
    architecture = decoding_model(config.model, QwenConfig.from_directory(directory)).config
    limit = config.max_length or architecture.max_position_embeddings
    return read_rows(any_path(config.input), load_tokenizer(directory), architecture.vocab_size, limit)


def score_rows(
    loaded: LoadedModel, rows: Sequence[list[int]], batch_size: int, names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Score token ids; each result has `input_ids`, `logprobs`, `greedy` (both None for the first) and `nll`.

    Rows of similar length are computed together, `batch_size` at a time; results are in the order of `rows`. Raises
    NonFiniteError with the row's name (default: its number) where the model's scores are NaN or infinite.
    """
    names = names or [f"row {i}" for i in range(len(rows))]
    batch_size = divisible_rows(batch_size, loaded.mesh)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    results: list[dict[str, Any]] = [{} for _ in rows]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids = np.zeros((batch_size, _bucket(len(rows[chosen[-1]]))), np.int32)
        for line, i in enumerate(chosen):
            input_ids[line, : len(rows[i])] = rows[i]
        with jax.set_mesh(loaded.mesh):
            logprobs, greedy = to_host(_score_batch(loaded.model, loaded.params, input_ids))
        for line, i in enumerate(chosen):
            scored = slice(0, len(rows[i]) - 1)
            if not np.isfinite(logprobs[line, scored]).all():
                raise NonFiniteError(names[i], loaded, rows[i])
            results[i] = {
                "input_ids": list(rows[i]),
                "logprobs": [None, *map(float, logprobs[line, scored])],
                "greedy": [None, *map(bool, greedy[line, scored])],
                "nll": float(-np.sum(logprobs[line, scored], dtype=np.float64)),
            }
    return results


@functools.partial(jax.jit, static_argnums=0)
def _score_batch(
    model: Qwen, params: Params, input_ids: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length"], Array]:
    """Log-probability of the next token at each position, and whether it is the arg-max there.

    Padding stands behind the text, where causal attention keeps it from mattering.
    """
    input_ids = constrain(input_ids, "batch", "length")
    positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    hidden, _ = model.hidden_states(params, input_ids, positions)
    targets = jnp.roll(input_ids, -1, axis=1)
    logprobs, best = token_logprobs(model, params, hidden, targets)
    return logprobs, best == targets


def _bucket(length: int) -> int:
    """The next power of two, or the one halfway to it: few shapes to compile, at most a third of padding."""
    size = _SHORTEST_BUCKET
    while size < length:
        size *= 2
    return size * 3 // 4 if size > _SHORTEST_BUCKET and length <= size * 3 // 4 else size


def read_rows(path: AnyPath, tokenizer: PreTrainedTokenizerBase, vocab_size: int, limit: int) -> list[ScoredRow]:
    """The rows of a JSONL file, each with `text` or `input_ids`, of at most `limit` ids.

    Raises InputError listing every line that cannot be used.
    """
    source = read_jsonl(path)
    problems = list(source.problems)
    rows = []
    lines_by_id: dict[str, int] = {}
    for index, (line, row) in enumerate(source.rows):
        row_id = row.get("id", index)
        first = lines_by_id.setdefault(repr(row_id), line)
        input_ids = row.get("input_ids")
        if isinstance(row.get("text"), str) and input_ids is None:
            try:
                input_ids = encode(row["text"], tokenizer, add_special_tokens=True)
            except ValueError as error:
                problems.append(Problem(line, f"text: {error}"))
                continue
        if not isinstance(input_ids, list) or any(type(i) is not int for i in input_ids):
            problems.append(Problem(line, "expected text (a string) or input_ids (a list of integers)"))
        elif not input_ids:
            problems.append(Problem(line, "empty"))
        elif not all(0 <= i < vocab_size for i in input_ids):
            problems.append(
                Problem(line, f"ids run from {min(input_ids)} to {max(input_ids)}, vocabulary {vocab_size}")
            )
        elif len(input_ids) > limit:
            problems.append(Problem(line, f"{len(input_ids)} tokens, at most {limit} fit"))
        elif first != line:
            problems.append(Problem(line, f"id {row_id!r} is that of line {first} too"))
        else:
            rows.append(ScoredRow(row_id, input_ids))
    if problems:
        raise source.error(problems)
    return rows
