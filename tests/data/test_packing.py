from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1jax.data.examples import Example
from s1jax.data.packing import Shape, StepPlan, build_batch, merge_shapes, plan_step, row_lengths

PAD_ID = 7


def plan(lengths, num_shards=1, longest_row=1024, packing=True):
    return plan_step(lengths, num_shards=num_shards, row_lengths=row_lengths(longest_row), packing=packing)


def example(length, rng):
    """Random ids, one or more of them trained on, never the first."""
    mask = rng.random(length) < 0.5
    mask[rng.integers(1, length)] = True
    mask[0] = False
    return Example(rng.integers(0, 1000, length, dtype=np.int32), mask)


# The plan


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [
        (4096, tuple(range(128, 4097, 128))),
        (9000, (*range(128, 4097, 128), *range(4352, 9217, 256))),
        (300, (128, 256, 384)),
        (128, (128,)),
        (64, (64,)),
    ],
)
def test_row_lengths(longest, lengths):
    assert row_lengths(longest) == lengths


SHAPES = st.dictionaries(
    st.builds(Shape, st.integers(1, 6), st.integers(1, 30)), st.integers(1, 50), min_size=1, max_size=20
)


def positions(steps, standing_in):
    return sum(count * standing_in[shape].positions for shape, count in steps.items())


@given(steps=SHAPES, most=st.integers(1, 8))
def test_merged_shapes_have_room_and_are_few(steps, most):
    standing_in = merge_shapes(steps, most)
    assert set(standing_in) == set(steps)
    assert len(set(standing_in.values())) <= most
    assert all(room.rows >= shape.rows and room.length >= shape.length for shape, room in standing_in.items())
    if len(steps) <= most:
        assert standing_in == {shape: shape for shape in steps}


@given(steps=SHAPES)
def test_the_join_that_adds_least_comes_first(steps):
    """One shape fewer: no other pair would have added less."""
    standing_in = merge_shapes(steps, max(1, len(steps) - 1))
    for first, second in combinations(steps, 2):
        joined = Shape(max(first.rows, second.rows), max(first.length, second.length))
        other = {shape: joined if shape in (first, second) else shape for shape in steps}
        assert positions(steps, standing_in) <= positions(steps, other)


LENGTHS = st.lists(st.integers(2, 1000), min_size=1, max_size=24)


@given(lengths=LENGTHS, num_shards=st.integers(1, 12), longest_row=st.integers(1000, 5000), packing=st.booleans())
def test_a_plan_holds_every_example_once_in_rows_of_a_known_length(lengths, num_shards, longest_row, packing):
    result = plan(lengths, num_shards, longest_row, packing)
    assert result == plan(lengths, num_shards, longest_row, packing)
    assert sorted(index for row in result.rows for index in row) == list(range(len(lengths)))
    assert len(result.rows) % num_shards == 0
    assert result.row_length in row_lengths(longest_row)
    assert all(sum(lengths[index] for index in row) <= result.row_length for row in result.rows)


@given(lengths=LENGTHS, num_shards=st.integers(1, 12))
def test_packing_never_has_more_tokens_than_not_packing(lengths, num_shards):
    packed, single = plan(lengths, num_shards), plan(lengths, num_shards, packing=False)
    assert len(packed.rows) * packed.row_length <= len(single.rows) * single.row_length


def test_without_packing_row_i_is_example_i_in_the_shortest_rows_that_hold_all():
    assert plan([10, 300, 20], packing=False) == StepPlan(((0,), (1,), (2,)), 384)
    assert plan([10, 384], packing=False) == StepPlan(((0,), (1,)), 384)
    assert plan([10, 385], packing=False) == StepPlan(((0,), (1,)), 512)


def test_rows_beyond_the_examples_are_empty():
    assert plan([10, 300, 20], num_shards=4, packing=False) == StepPlan(((0,), (1,), (2,), ()), 384)
    assert plan([10, 300], num_shards=4) == StepPlan(((1,), (0,), (), ()), 384)


def test_packing_takes_the_fewest_tokens_per_shard():
    # 4 rows of 384, 3 of 512 and 2 of 768 are 1,536 tokens each; 2 of 512 cannot hold all, 1 of 1,024 can.
    assert plan([300, 250, 250, 224]) == StepPlan(((0, 1, 2, 3),), 1024)
    # On four shards nothing is gained by sharing rows.
    assert plan([300, 250, 250, 224], num_shards=4) == StepPlan(((0,), (1,), (2,), (3,)), 384)


def test_among_equals_rows_are_short():
    # 4 x 256 = 2 x 512 = 1 x 1024.
    assert plan([256, 256, 256, 256]) == StepPlan(((0,), (1,), (2,), (3,)), 256)
    # 2 x 512 = 1 x 1024, and 256 is too short.
    assert plan([300, 212, 300, 212]) == StepPlan(((0, 1), (2, 3)), 512)


def test_rows_are_balanced_where_that_is_free():
    lengths = [700, 600, 300, 200, 100, 50]
    loads = [sum(lengths[index] for index in row) for row in plan(lengths, num_shards=2).rows]
    assert sorted(loads) == [950, 1000]


def test_a_tight_packing_is_found_where_a_balanced_one_does_not_fit():
    # The balanced greedy would put the two long ones in different rows, and one row would overflow.
    lengths = [384, 384, 256, 256, 256]
    assert plan(lengths, num_shards=2, longest_row=768) == StepPlan(((2, 3, 4), (0, 1)), 768)


def test_an_example_longer_than_every_row_is_refused():
    with pytest.raises(ValueError, match="an example of 65 tokens does not fit a row of 64"):
        plan_step([10, 65], num_shards=1, row_lengths=(32, 64), packing=True)


def test_a_plan_in_a_larger_shape_has_the_same_rows_and_empty_ones():
    assert StepPlan(((1,), (0, 2)), 128).padded(Shape(4, 256)) == StepPlan(((1,), (0, 2), (), ()), 256)


# The rows


def build(examples, step_plan, num_microbatches=1, row_shard=(0, 1), loss_average="sample"):
    return build_batch(
        examples,
        step_plan,
        num_microbatches=num_microbatches,
        row_shard=row_shard,
        most_segments=max(len(row) for row in step_plan.rows),
        loss_average=loss_average,
        pad_id=PAD_ID,
    )


def test_two_examples_in_a_row_exactly():
    examples = [
        Example(np.array([11, 12, 13], np.int32), np.array([False, True, True])),
        Example(np.array([21, 22, 23, 24], np.int32), np.array([False, False, False, True])),
    ]
    step_plan = StepPlan(((1, 0), ()), 8)
    batch = build(examples, step_plan, num_microbatches=2)
    assert batch.input_ids.tolist() == [[[21, 22, 23, 24, 11, 12, 13, PAD_ID]], [[PAD_ID] * 8]]
    assert batch.targets.tolist() == [[[22, 23, 24, 0, 12, 13, 0, 0]], [[0] * 8]]
    assert batch.positions.tolist() == [[[0, 1, 2, 3, 0, 1, 2, 0]], [[0] * 8]]
    assert batch.segment_ids.tolist() == [[[1, 1, 1, 1, 2, 2, 2, 0]], [[0] * 8]]
    assert batch.segment_lengths.tolist() == [[[4, 3]], [[0, 0]]]
    assert batch.weights.tolist() == [[[0, 0, 0.5, 0, 0.25, 0.25, 0, 0]], [[0] * 8]]
    assert [array.dtype for array in batch] == [np.int32] * 5 + [np.float32]
    by_token = build(examples, step_plan, num_microbatches=2, loss_average="token")
    np.testing.assert_allclose(by_token.weights[0, 0], np.array([0, 0, 1, 0, 1, 1, 0, 0]) / 3, rtol=1e-6)


@given(
    lengths=LENGTHS,
    num_shards=st.sampled_from([1, 2, 4, 8]),
    num_microbatches=st.sampled_from([1, 2]),
    packing=st.booleans(),
    loss_average=st.sampled_from(["sample", "token"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_rows_hold_the_examples(lengths, num_shards, num_microbatches, packing, loss_average, seed):
    rng = np.random.default_rng(seed)
    examples = [example(length, rng) for length in lengths]
    step_plan = plan(lengths, num_shards * num_microbatches, packing=packing)
    batch = build(examples, step_plan, num_microbatches, loss_average=loss_average)
    shape = (num_microbatches, len(step_plan.rows) // num_microbatches, step_plan.row_length)
    *by_position, lengths_of, weights = batch
    assert {array.shape for array in (*by_position, weights)} == {shape}
    np.testing.assert_allclose(batch.weights.sum(dtype=np.float64), 1, rtol=1e-5)

    arrays = (*by_position, weights)
    ids, targets, positions, segments, weights = (array.reshape(-1, step_plan.row_length) for array in arrays)
    lengths_of = lengths_of.reshape(len(step_plan.rows), -1)
    all_trained = sum(int(e.loss_mask.sum()) for e in examples)
    for row, indices in enumerate(step_plan.rows):
        # Contiguous examples from the left, numbered from 1, then padding.
        expected = [n for n, index in enumerate(indices, 1) for _ in range(lengths[index])]
        assert lengths_of[row, : len(indices)].tolist() == [lengths[index] for index in indices]
        assert not lengths_of[row, len(indices) :].any()
        assert segments[row].tolist() == expected + [0] * (step_plan.row_length - len(expected))
        for n, index in enumerate(indices, 1):
            here = segments[row] == n
            one = examples[index]
            trained = int(one.loss_mask.sum())
            divisor = trained * len(examples) if loss_average == "sample" else all_trained
            assert ids[row, here].tolist() == one.input_ids.tolist()
            assert targets[row, here].tolist() == [*one.input_ids[1:].tolist(), 0]
            assert positions[row, here].tolist() == list(range(lengths[index]))
            np.testing.assert_allclose(weights[row, here], [*(one.loss_mask[1:] / divisor), 0], rtol=1e-6)
        padding = segments[row] == 0
        assert set(ids[row, padding].tolist()) <= {PAD_ID}
        assert not any(array[row, padding].any() for array in (targets, positions, weights))


@given(lengths=LENGTHS, num_microbatches=st.sampled_from([1, 2, 3]), count=st.sampled_from([1, 2, 4]))
def test_the_parts_of_all_processes_make_up_the_step(lengths, num_microbatches, count):
    rng = np.random.default_rng(0)
    examples = [example(length, rng) for length in lengths]
    step_plan = plan(lengths, num_shards=4 * num_microbatches)
    whole = build(examples, step_plan, num_microbatches)
    parts = [build(examples, step_plan, num_microbatches, row_shard=(index, count)) for index in range(count)]
    for field, array in whole._asdict().items():
        np.testing.assert_array_equal(np.concatenate([getattr(part, field) for part in parts], axis=1), array)
