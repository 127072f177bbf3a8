"""Lays the examples of one optimiser step out in rows of one length.

A step always has the same number of examples; packing only decides how many share a row. Row lengths come
from a small set, so that few shapes are compiled.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from s1jax.data.examples import Example

LossAverage = Literal["sample", "token"]


class Shape(NamedTuple):
    """The size of a step's rows, which a program is compiled for."""

    rows: int
    length: int

    @property
    def positions(self) -> int:
        """Tokens and padding together."""
        return self.rows * self.length


@dataclass(frozen=True)
class StepPlan:
    """Which examples go into which row: indices into the step's lengths, in the order they lie in the row."""

    rows: tuple[tuple[int, ...], ...]
    row_length: int

    @property
    def shape(self) -> Shape:
        """Number and length of the rows."""
        return Shape(len(self.rows), self.row_length)

    def padded(self, shape: Shape) -> "StepPlan":
        """The same rows, made longer, and empty ones after them."""
        return StepPlan(self.rows + ((),) * (shape.rows - len(self.rows)), shape.length)


class Batch(NamedTuple):
    """The rows of one optimiser step, or one process's part of them; numpy arrays here, jax arrays once on devices.

    The loss of the whole step is `sum(weights * nll)` over all microbatches and processes, where `nll` is the
    negative log-likelihood of `targets`. Padding has segment 0, position 0, target 0 and weight 0.
    """

    input_ids: Int32[Any, "microbatches rows length"]
    """Tokens, `pad_id` where there is none."""
    targets: Int32[Any, "microbatches rows length"]
    """The next token of the same example; 0 at its last token."""
    positions: Int32[Any, "microbatches rows length"]
    """Position within the example, from 0."""
    segment_ids: Int32[Any, "microbatches rows length"]
    """1, 2, 3, ... for the examples of a row, 0 for padding."""
    segment_lengths: Int32[Any, "microbatches rows segments"]
    """Tokens of each example of a row, in order, then zeros; GPU's attention wants them beside the segment ids."""
    weights: Float32[Any, "microbatches rows length"]
    """Weight of each target in the loss of the step."""


def row_lengths(longest: int) -> tuple[int, ...]:
    """Lengths that rows may have, ascending; the last holds `longest` tokens.

    They are multiples of the tiles of TPU and GPU attention kernels: 128, and from 4,096 on 256, which is faster.
    """
    if longest <= 128:
        return (longest,)
    fine = range(128, min(_round_up(longest, 128), 4096) + 1, 128)
    return (*fine, *range(4096 + 256, _round_up(longest, 256) + 1, 256))


def merge_shapes(steps: Mapping[Shape, int], most: int) -> dict[Shape, Shape]:
    """For each shape that steps need, one of at most `most` shapes that has room for it.

    Two shapes after another are joined into one that holds both, those first that this adds the fewest positions to
    over all of their steps, so that a run compiles few programs and computes little padding.

    Args:
        steps: how many steps need each shape.
        most: shapes to be left.
    """
    groups = [[shape] for shape in sorted(steps)]
    rows, lengths = np.array(sorted(steps)).T
    counts = np.array([steps[shape] for shape in sorted(steps)])
    while len(groups) > most:
        joined = np.maximum.outer(rows, rows) * np.maximum.outer(lengths, lengths)
        added = counts * (joined - rows * lengths)
        cost = np.triu(added + added.T, 1) + np.tril(np.full(joined.shape, np.inf))
        keep, gone = np.unravel_index(np.argmin(cost), cost.shape)
        groups[keep] += groups.pop(gone)
        rows[keep], lengths[keep] = max(rows[keep], rows[gone]), max(lengths[keep], lengths[gone])
        counts[keep] += counts[gone]
        rows, lengths, counts = (np.delete(values, gone) for values in (rows, lengths, counts))
    return {
        shape: Shape(int(row), int(length))
        for group, row, length in zip(groups, rows, lengths, strict=True)
        for shape in group
    }


def plan_step(lengths: Sequence[int], *, num_shards: int, row_lengths: Sequence[int], packing: bool) -> StepPlan:
    """Decide which of a step's examples go to which row; the same input always gives the same plan.

    Among the row lengths and row counts that hold all examples, the plan has the fewest tokens per shard,
    counting padding; among equals the shortest rows, since attention costs grow with their length. Rows are
    balanced (longest-processing-time greedy) unless only a tight packing (best fit) gets by with so few.

    Args:
        lengths: tokens of each example.
        num_shards: the number of rows is a multiple of this; rows beyond what is needed are empty.
        row_lengths: lengths to choose from, ascending.
        packing: whether examples may share rows. Without, row i is example i.

    Raises:
        ValueError: if an example is longer than every row.
    """
    longest = max(lengths)
    if longest > row_lengths[-1]:
        raise ValueError(f"an example of {longest} tokens does not fit a row of {row_lengths[-1]}")
    row_lengths = row_lengths[bisect_left(row_lengths, longest) :]

    most_rows = _round_up(len(lengths), num_shards)
    if not packing:
        rows = [[index] for index in range(len(lengths))]
        return _plan(rows, most_rows, row_lengths[0])

    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    total = sum(lengths)
    best = _plan([[index] for index in order], most_rows, row_lengths[0])
    for row_length in row_lengths:
        fewest_rows = _round_up(-(-total // row_length), num_shards)
        for num_rows in range(fewest_rows, most_rows, num_shards):
            if num_rows * row_length >= len(best.rows) * best.row_length:
                break
            filled = _fill(order, lengths, num_rows, row_length)
            if filled is not None:
                best = _plan(filled, num_rows, row_length)
                break
    return best


def build_batch(
    examples: Sequence[Example],
    plan: StepPlan,
    *,
    num_microbatches: int,
    row_shard: tuple[int, int],
    most_segments: int,
    loss_average: LossAverage,
    pad_id: int,
) -> Batch:
    """Lay out this process's rows of a step.

    Args:
        examples: all examples of the step, in the order of the plan's indices.
        plan: where they go; its rows in order are the rows of microbatch 0, then of microbatch 1, ...
        num_microbatches: microbatches that the rows are divided into, evenly.
        row_shard: (index, count): the rows of each microbatch are divided into `count` contiguous equal
            parts, and part `index` is built.
        most_segments: room for the lengths of a row's examples; no row has more.
        loss_average: "sample" averages each example's mean token loss over the step's examples, as s1's
            training did (one example per device, plain averages over devices); "token" averages over all
            trained tokens of the step.
        pad_id: token id of padding; nothing depends on it.
    """
    shard, num_shards = row_shard
    row_indices = np.arange(len(plan.rows)).reshape(num_microbatches, num_shards, -1)[:, shard]
    trained = [int(example.loss_mask.sum()) for example in examples]

    shape = (*row_indices.shape, plan.row_length)
    batch = Batch(
        input_ids=np.full(shape, pad_id, np.int32),
        targets=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        segment_lengths=np.zeros((*row_indices.shape, most_segments), np.int32),
        weights=np.zeros(shape, np.float32),
    )
    for (microbatch, row), row_index in np.ndenumerate(row_indices):
        start = 0
        for segment, index in enumerate(plan.rows[row_index], start=1):
            ids, mask = examples[index].input_ids, examples[index].loss_mask
            divisor = trained[index] * len(examples) if loss_average == "sample" else sum(trained)
            here = (microbatch, row, slice(start, start + ids.size))
            predicting = (microbatch, row, slice(start, start + ids.size - 1))
            batch.input_ids[here] = ids
            batch.positions[here] = np.arange(ids.size)
            batch.segment_ids[here] = segment
            batch.segment_lengths[microbatch, row, segment - 1] = ids.size
            batch.targets[predicting] = ids[1:]
            batch.weights[predicting] = mask[1:] / divisor
            start += ids.size
    return batch


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _plan(rows: list[list[int]], num_rows: int, row_length: int) -> StepPlan:
    padded = rows + [[]] * (num_rows - len(rows))
    return StepPlan(tuple(tuple(row) for row in padded), row_length)


def _fill(order: list[int], lengths: Sequence[int], num_rows: int, row_length: int) -> list[list[int]] | None:
    """Rows that hold all examples, longest first: into the emptiest row, or if that fails the fullest."""
    for tight in (False, True):
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        loads = [(0, row) for row in range(num_rows)]  # ascending
        for index in order:
            room = row_length - lengths[index]
            fullest = bisect_right(loads, (room, num_rows)) - 1  # of those that still have room
            if fullest < 0:
                break
            load, row = loads.pop(fullest if tight else 0)
            rows[row].append(index)
            insort(loads, (load + lengths[index], row))
        else:
            return rows
    return None
