"""The order of rows and the shapes of batches."""

from __future__ import annotations

import numpy as np
import pytest

from train import batches
from train.examples import Example
from train.tasks.text import Text


def examples(lengths: list[int]) -> list[Example]:
    return [Example(np.arange(1, n + 1, dtype=np.int32), np.arange(n) >= n - 2, row) for row, n in enumerate(lengths)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 50])
def test_every_row_once_an_epoch_and_the_order_is_a_function_of_seed_and_epoch(size: int) -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(2, 60, size=31)]
    buckets = batches.edges(lengths)
    for seed in (0, 1):
        for epoch in range(3):
            plan = batches.plan(lengths, buckets, size, seed, epoch)
            assert plan == batches.plan(lengths, buckets, size, seed, epoch)
            assert sorted(row for window in plan for row in window.rows) == list(range(31))
            assert sum(len(window.rows) < size for window in plan) == (31 % size > 0)
            assert all(lengths[row] <= window.length for window in plan for row in window.rows)
            assert len(plan) == -(-31 // size)
    assert batches.plan(lengths, buckets, size, 0, 0) != batches.plan(lengths, buckets, size, 0, 1)
    assert batches.plan(lengths, buckets, size, 0, 0) != batches.plan(lengths, buckets, size, 1, 0)


def test_a_mixture_gives_every_row_its_turn_at_its_weight() -> None:
    parts, weights = (10, 7, 4), (0.5, 0.8)  # 5 of 7 and 8 of 4 rows an epoch
    assert batches.shares(parts, weights) == [10, 5, 8]
    epochs = [batches.mixture(parts, weights, 3, epoch) for epoch in range(7)]
    for epoch, rows in enumerate(epochs):
        assert sorted(rows[:10]) == list(range(10))
        assert set(rows[10:15]) <= set(range(10, 17))
        assert sorted(rows[15:]) == sorted([*range(17, 21), *range(17, 21)])
        assert np.array_equal(rows, batches.mixture(parts, weights, 3, epoch))
    # After seven epochs each row of the second part had five turns, and at no time one had two more than another.
    counts = np.zeros(7, int)
    for row in np.concatenate([rows[10:15] for rows in epochs]):
        counts[row - 10] += 1
        assert counts.max() - counts.min() <= 1
    assert counts.tolist() == [5] * 7
    assert not np.array_equal(epochs[0], batches.mixture(parts, weights, 4, 0))
    plan = batches.plan([4] * 21, (8,), 4, 3, 1, epochs[1])
    assert sorted(row for window in plan for row in window.rows) == sorted(epochs[1])
    assert len(plan) == 6


def test_few_shapes() -> None:
    lengths = list(range(1, 500))
    buckets = batches.edges(lengths)
    assert len(buckets) == 3
    assert buckets[-1] >= 499
    assert batches.edges([5]) == (8,)
    assert batches.edges([3, 8, 8]) == (8,)


def test_evaluation_takes_every_row_once() -> None:
    lengths = [3, 30, 5, 9, 40, 2]
    windows = batches.in_order(lengths, batches.edges(lengths), 2)
    assert sorted(row for window in windows for row in window.rows) == list(range(6))


def test_arrays() -> None:
    made = batches.Batches(Text, examples([4, 6]))(batches.Window((1, 0), 8), 3)
    assert made["input_ids"].tolist()[:2] == [[1, 2, 3, 4, 5, 6, 0, 0], [1, 2, 3, 4, 0, 0, 0, 0]]
    assert made["attention_mask"].sum(1).tolist() == [6, 4, 6]
    # The fifth token is predicted at the fourth; the third row only fills the batch up.
    assert made["positions"][0, :2].tolist() == [3, 4]
    assert made["labels"][0].tolist() == [5, 6, -100, -100, -100, -100, -100]
    assert (made["labels"][2] == -100).all()
    assert made["positions"].shape == (3, 7)
    assert made["weights"].tolist() == [2, 2, 0]


@pytest.mark.parametrize("places", [[0, 1], [1, 3, 4], [4, 5]])
def test_some_rows_of_a_batch(places: list[int]) -> None:
    """They are those of the whole, for a process that has no others; what fills up has weight 0 either way."""
    feed, window = batches.Batches(Text, examples([3, 5, 2, 4])), batches.Window((3, 1, 2), 6)
    whole, some = feed(window, 6), feed(window, 6, places)
    assert some.keys() == whole.keys()
    for name, array in some.items():
        assert array.shape == (len(places), *whole[name].shape[1:])
        assert (array.dtype, array[0].tolist()) == (whole[name].dtype, whole[name][places[0]].tolist())
    assert some["weights"].tolist() == whole["weights"][places].tolist()


def test_padding_is_decided_by_the_mask_not_by_the_id() -> None:
    ids = np.array([0, 5, 0, 2], np.int32)
    made = batches.Batches(Text, [Example(ids, np.array([False, True, True, True]), 0)])(batches.Window((0,), 8), 1)
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert made["labels"][0, :3].tolist() == [5, 0, 2]
