"""An iterator over optimiser steps, with prefetch and an exact, mesh-independent state.

Everything about a step follows from its number: which examples, from the seed and the epoch; which rows,
from their lengths. So all processes agree on it without talking, and a state is little more than that number.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Int

from s1jax.data.examples import Example
from s1jax.data.packing import Batch, LossAverage, Shape, StepPlan, build_batch, merge_shapes, plan_step, row_lengths

# Examples are in memory and a batch takes milliseconds to lay out: one thread, two batches ahead, keeps up.
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


MOST_SHAPES = 8
"""Programs that a run compiles. With 8, 9% of s1K on 8 shards are padding; with any number it would be 7%."""


class StepCounts(NamedTuple):
    """What one step holds over all processes."""

    examples: int
    tokens: int
    trained_tokens: int
    squared_lengths: int
    """Sum of the squares of the examples' lengths, which attention's arithmetic grows with."""


class StepLoader(Iterator[Batch]):
    """Iterates over this process's rows of each optimiser step, for a number of epochs.

    The order of an epoch is a permutation drawn from (seed, epoch), or that of `examples` without shuffling.
    The last step of an epoch is filled up with the epoch's first examples, as accelerate's `even_batches`
    does, so s1K takes 63 steps of 16 an epoch. With `fill_last=False`, for evaluation, it is left short
    instead and its weights cover the examples there are.

    Args:
        examples: the training set.
        batch_size: examples per optimiser step, over all processes and microbatches.
        num_epochs: passes over the examples.
        shuffle: whether each epoch has its own order.
        seed: of the orders, 0 or more.
        packing: whether examples share rows; see `packing.plan_step`.
        loss_average: see `packing.build_batch`.
        max_row_length: the longest row there can be, in tokens, up to the tile that row lengths are rounded to.
        num_microbatches: parts of a step that gradients are accumulated over.
        num_shards: the rows of a step are a multiple of this: batch shards of the mesh times
            `num_microbatches`.
        row_shard: (index, count) of this process's part of the rows of each microbatch.
        pad_id: token id of padding.
        fill_last: whether the last step of an epoch is filled up.

    Raises:
        ValueError: if rows cannot be divided as asked.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        num_epochs: int,
        shuffle: bool,
        seed: int,
        packing: bool,
        loss_average: LossAverage,
        max_row_length: int,
        num_microbatches: int,
        num_shards: int,
        row_shard: tuple[int, int],
        pad_id: int,
        fill_last: bool = True,
    ):
        _check_division(batch_size, packing, num_microbatches, num_shards, row_shard)
        self._examples = examples
        self._batch_size = batch_size
        self._num_epochs = num_epochs
        self._shuffle = shuffle
        self._seed = seed
        self._packing = packing
        self._loss_average = loss_average
        self._num_microbatches = num_microbatches
        self._num_shards = num_shards
        self._row_shard = row_shard
        self._pad_id = pad_id
        self._fill_last = fill_last

        self._lengths = np.array([example.input_ids.size for example in examples])
        self._trained = np.array([example.loss_mask.sum() for example in examples])
        self._row_lengths = row_lengths(max_row_length)
        self._epoch_order = lru_cache(maxsize=2)(self._draw_epoch_order)
        self._iterator = iter(grain.MapDataset.range(len(self)).map(self._load).to_iter_dataset(READ_OPTIONS))

    def __len__(self) -> int:
        """Steps in all epochs."""
        return self.steps_per_epoch * self._num_epochs

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch: ceil(examples / batch_size)."""
        return -(-len(self._examples) // self._batch_size)

    def counts(self, step: int) -> StepCounts:
        """What that step holds, over all processes."""
        indices = self._step_indices(step)
        lengths, trained = self._lengths[indices], self._trained[indices]
        return StepCounts(len(indices), int(lengths.sum()), int(trained.sum()), int((lengths**2).sum()))

    @cached_property
    def shapes(self) -> dict[Shape, int]:
        """How many of all the steps have each shape."""
        return self.shapes_of(range(len(self)))

    def shapes_of(self, steps: range) -> dict[Shape, int]:
        """How many of these steps, counted from 0, have each shape."""
        return dict(Counter(self._plan(step).shape for step in steps))

    def abstract_batch(self, shape: Shape, sharding: jax.sharding.Sharding) -> Batch:
        """Shapes and dtypes of all processes' rows of a step of that shape, to compile for."""
        rows = (self._num_microbatches, shape.rows // self._num_microbatches)
        columns = {"segment_lengths": self.most_segments}
        dtypes = {"weights": np.float32}
        return Batch(
            *(
                jax.ShapeDtypeStruct(
                    (*rows, columns.get(name, shape.length)), dtypes.get(name, np.int32), sharding=sharding
                )
                for name in Batch._fields
            )
        )

    @cached_property
    def squared_lengths(self) -> dict[Shape, float]:
        """Of a step of each shape, the squares of its examples' lengths together; the mean over all such steps."""
        sums = Counter[Shape]()
        for step in range(len(self)):
            sums[self._plan(step).shape] += self.counts(step).squared_lengths
        return {shape: sums[shape] / steps for shape, steps in self.shapes.items()}

    @cached_property
    def most_segments(self) -> int:
        """The most examples that a row of any step has."""
        return max(len(row) for plan in self._tight_plans for row in plan.rows)

    @property
    def padding_share(self) -> float:
        """The share of padding in all rows of all steps."""
        tokens = sum(self.counts(step).tokens for step in range(len(self)))
        return 1 - tokens / sum(rows * length * steps for (rows, length), steps in self.shapes.items())

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values: the steps taken, and what must be the same to go on from there.

        It holds nothing of how rows are packed or divided, so a run can go on with another mesh.
        """
        return {"step": self._iterator.get_state()["next_index"], **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `get_state` was called.

        Raises:
            ValueError: if the state is of other data or another order of it, or beyond this loader's end.
        """
        different = [
            f"{key}: {state.get(key)!r} in the state, {value!r} here"
            for key, value in self._identity.items()
            if state.get(key) != value
        ]
        if different:
            raise ValueError(f"cannot continue the data where the state left off: {'; '.join(different)}")
        if not 0 <= state["step"] <= len(self):
            raise ValueError(f"the state is at step {state['step']}, but there are {len(self)} steps")
        self._iterator.set_state({"next_index": state["step"]})

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "num_examples": len(self._examples),
            "num_tokens": int(self._lengths.sum()),
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
        }

    def _draw_epoch_order(self, epoch: int) -> Int[np.ndarray, " examples"]:
        if not self._shuffle:
            return np.arange(len(self._examples))
        # Raw draws of a bit generator are the same in every version of numpy; `permutation` need not be.
        bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        return np.argsort(bits.random_raw(len(self._examples)), kind="stable")

    def _step_indices(self, step: int) -> Int[np.ndarray, " batch"]:
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        places = np.arange(step_of_epoch * self._batch_size, (step_of_epoch + 1) * self._batch_size)
        if self._fill_last:
            return order[places % order.size]
        return order[places[places < order.size]]

    @cached_property
    def _tight_plans(self) -> list[StepPlan]:
        """Of each step, the rows that it needs."""
        return [
            plan_step(
                self._lengths[self._step_indices(step)].tolist(),
                num_shards=self._num_shards,
                row_lengths=self._row_lengths,
                packing=self._packing,
            )
            for step in range(len(self))
        ]

    @cached_property
    def _shape_for(self) -> dict[Shape, Shape]:
        return merge_shapes(Counter(plan.shape for plan in self._tight_plans), MOST_SHAPES)

    def _plan(self, step: int) -> StepPlan:
        plan = self._tight_plans[step]
        return plan.padded(self._shape_for[plan.shape])

    def _load(self, step: int) -> Batch:
        return build_batch(
            [self._examples[index] for index in self._step_indices(step)],
            self._plan(step),
            num_microbatches=self._num_microbatches,
            row_shard=self._row_shard,
            most_segments=self.most_segments,
            loss_average=self._loss_average,
            pad_id=self._pad_id,
        )


def _check_division(
    batch_size: int, packing: bool, num_microbatches: int, num_shards: int, row_shard: tuple[int, int]
) -> None:
    if num_shards % num_microbatches:
        raise ValueError(f"num_shards={num_shards} must be a multiple of num_microbatches={num_microbatches}")
    index, count = row_shard
    if not 0 <= index < count or (num_shards // num_microbatches) % count:
        raise ValueError(
            f"row_shard={row_shard} must be (index, count) with index < count, and count must divide the "
            f"{num_shards // num_microbatches} shards of a microbatch"
        )
    if not packing and batch_size % num_shards:
        raise ValueError(
            f"without packing each example has its own row, so batch_size={batch_size} must be a multiple of "
            f"the {num_shards} shards (batch shards of the mesh x microbatches); or turn packing on"
        )
