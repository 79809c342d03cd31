"""Which rows form which step, and the arrays of a step.

The order is a pure function of seed, epoch and position, so that a run can go on anywhere. Rows are grouped by length
into a few buckets: a run compiles one program per bucket, and little of a batch is padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from train.examples import Example

if TYPE_CHECKING:
    from train.tasks.task import Task

IGNORED = -100  # the label of tokens that are not learnt


@dataclasses.dataclass(frozen=True)
class Window:
    """The rows of one optimizer step, padded to `length` tokens; positions in the list of examples."""

    rows: tuple[int, ...]
    length: int
    epoch: int = 0


def edges(lengths: Sequence[int], most: int = 3) -> tuple[int, ...]:
    """At most `most` bucket lengths for rows of these lengths: half of the rows, nine tenths, all."""
    ordered = np.sort(np.asarray(lengths))
    shares = (0.5, 0.9, 1.0)[-most:]
    chosen = [int(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for share in shares]
    return tuple(sorted({rounded(length) for length in chosen}))


def rounded(length: int) -> int:
    """The next length that is worth a program of its own."""
    step = 8 if length <= 128 else 32 if length <= 512 else 128
    return -(-length // step) * step


def shares(parts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows of each part an epoch has: all of the first, of each other its weight times as many."""
    return [parts[0], *(max(1, round(weight * parts[0])) for weight in weights)]


def mixture(parts: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch of a mixture, not shuffled: positions in the list of examples, where parts stand in order.

    Each part but the first goes on where it was in the epoch before, in passes of an order of their own; so no row has
    its second turn before all have had their first.
    """
    counts, starts = shares(parts, weights), np.cumsum([0, *parts])
    rows = [np.arange(parts[0])]
    for part in range(1, len(parts)):
        turns = np.arange(epoch * counts[part], (epoch + 1) * counts[part])
        passes, places = np.divmod(turns, parts[part])
        for number in range(int(passes[0]), int(passes[-1]) + 1):
            generator = np.random.Generator(np.random.PCG64([seed, number, part, 1]))
            rows.append(starts[part] + generator.permutation(parts[part])[places[passes == number]])
    return np.concatenate(rows)


def plan(
    lengths: Sequence[int],
    buckets: Sequence[int],
    size: int,
    seed: int,
    epoch: int,
    rows: np.ndarray | None = None,
    *,
    chunk: int | None = None,
) -> list[Window]:
    """The windows of `size` rows of an epoch, in order; one of them may be smaller.

    rows: those of the epoch, default all. chunk: the part of the epoch that they are, if it is cut in several. Rows
    left over in a bucket move up to the next longer one, so every row is used once.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch] if chunk is None else [seed, epoch, chunk]))
    order = generator.permutation(len(lengths) if rows is None else rows)
    where = np.searchsorted(np.asarray(buckets), np.asarray(lengths)[order])
    windows: list[Window] = []
    left: list[int] = []
    for number, length in enumerate(buckets):
        chosen = left + [int(row) for row in order[where == number]]
        whole = len(chosen) // size * size
        windows += [Window(tuple(chosen[start : start + size]), length, epoch) for start in range(0, whole, size)]
        left = chosen[whole:]
    if left:
        windows.append(Window(tuple(left), buckets[-1], epoch))
    return [windows[index] for index in generator.permutation(len(windows))]


def in_order(lengths: Sequence[int], buckets: Sequence[int], size: int) -> list[Window]:
    """Windows for evaluation: every row once, by bucket."""
    where = np.searchsorted(np.asarray(buckets), np.asarray(lengths))
    windows = []
    for number, length in enumerate(buckets):
        rows = [int(row) for row in np.flatnonzero(where == number)]
        windows += [Window(tuple(rows[start : start + size]), length) for start in range(0, len(rows), size)]
    return windows


def arrays(examples: Sequence[Example], length: int, rows: int) -> dict[str, np.ndarray]:
    """What a model reads of `rows` rows of `length` tokens: fewer examples are filled up with copies of the first.

    input_ids, attention_mask: [B, T] int32; token_type_ids and segment_ids likewise if the examples have them.
    """
    chosen = [*examples, *[examples[0]] * (rows - len(examples))]
    shape = (rows, length)
    made: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in ("input_ids", "attention_mask")}
    if chosen[0].types is not None:
        made["token_type_ids"] = np.zeros(shape, np.int32)
    if chosen[0].segments is not None:
        made["segment_ids"] = np.zeros(shape, np.int32)
    for at, example in enumerate(chosen):
        size = len(example)
        made["input_ids"][at, :size] = example.ids
        made["attention_mask"][at, :size] = 1
        if example.types is not None:
            made["token_type_ids"][at, :size] = example.types
        if example.segments is not None:
            made["segment_ids"][at, :size] = example.segments
    return made


class Batches:
    """Makes the arrays of a set's batches: what the model reads, and what `task` is to learn of it.

    Rows that fill up a batch weigh nothing and have nothing to learn: in targets they are zeros, labels `IGNORED`.
    seed: of what is drawn for the rows anew in each epoch; without one it is the same in all. chunk: of a stream, in
    which these are the examples. width: see `Task.width`.
    """

    def __init__(
        self,
        task: Task | type[Task],
        examples: Sequence[Example],
        seed: int | None = None,
        *,
        chunk: int = 0,
        width: int | None = None,
    ):
        self._task, self._examples, self._seed, self._chunk = task, examples, seed, chunk
        self.width = task.width(examples) if width is None else width

    def __call__(self, window: Window, rows: int, places: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """A batch of `rows` rows, of which the window's come first; arrays [B, ...].

        places: which of the rows are wanted, in ascending order; default all.
        """
        if places is not None:
            if not any(place < len(window.rows) for place in places):  # what fills up is made from the first row
                return {name: array[1:] for name, array in self(window, rows, [0, *places]).items()}
            kept = tuple(window.rows[place] for place in places if place < len(window.rows))
            return self(dataclasses.replace(window, rows=kept), len(places))
        chosen = [self._example(row, window.epoch) for row in window.rows]
        made = self._task.targets(chosen, window.length, self.width)
        empty = rows - len(chosen)
        filled = {
            name: np.pad(
                array,
                [(0, empty)] + [(0, 0)] * (array.ndim - 1),
                constant_values=IGNORED if name == "labels" and array.dtype == np.int32 else 0,
            )
            for name, array in made.items()
        }
        return {**arrays(chosen, window.length, rows), **filled}

    def _example(self, row: int, epoch: int) -> Example:
        example = self._examples[row]
        if not self._task.draws:
            return example
        # Seeds of runs are smaller, so no run trains on the masks that it is scored by.
        key = [2**31, 0, row] if self._seed is None else [self._seed, epoch, row]
        key += [self._chunk] if self._chunk else []
        return self._task.drawn(example, np.random.Generator(np.random.PCG64(key)))


def split(batch: dict[str, np.ndarray], parts: int) -> dict[str, np.ndarray]:
    """A batch as `parts` micro-batches on a new leading axis."""
    return {name: array.reshape(parts, array.shape[0] // parts, *array.shape[1:]) for name, array in batch.items()}
