"""What a run is going to do, step by step, before it does anything: its windows of rows, shapes, rates, optimizer.

Made from shapes alone, so a model without arrays has a plan as well.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import jpeft
from train import batches, placing
from train.data import TaskData
from train.examples import Example
from train.optimizers import matrices, rates, recipe
from train.schema import Config, TrainingConfig
from train.streams import StreamedWindow

_BLOCK = 1024  # steps whose learning rates are worked out at once


class Plan:
    """The steps of a run of `config` over `task`, for the adapted `model`.

    lengths: tokens of each training row. per_step: rows of an optimizer step. per_epoch: steps of a pass over the rows.
    steps: in all. every: steps between evaluations. windows: the rows of each step; of a stream, those that are known
    before it is read. recipe: of the optimizer; transform: the optimizer, with what the methods do to it. on_host:
    whether its state is kept in the memory of the host.
    """

    def __init__(self, config: Config, model: Any, task: TaskData):
        training = config.training
        adapter = jpeft.partition(model).adapter
        self._task, self._seed = task, training.seed
        self.lengths = [len(example) for example in task.train]
        self.buckets = batches.edges([*self.lengths, *map(len, task.test)])
        self._widest = batches.rounded(config.data.max_length)
        if task.stream is not None:  # longer rows may come
            self.buckets = tuple(sorted({*self.buckets, self._widest}))
        self.accumulation = training.accumulation
        self.per_step = training.batch_size * training.accumulation
        weights = list((config.data.mix or {}).values())
        counts = batches.shares(task.parts, weights) if task.parts else [len(task.train)]
        self.per_epoch = math.ceil(sum(counts) / self.per_step)
        self._mixture = _mixture(config, counts)
        self.steps, self._short = steps_of(training, self.per_epoch)
        self.every = config.evaluation.every or self.per_epoch
        if task.stream is not None and len(task.train) < self.per_step:
            self._short += (
                f"\nwarning   data.chunk is {config.data.chunk:,}, and its first rows give {len(task.train)} to learn "
                f"from, fewer than the {self.per_step} of a step, which then has no more; read more rows at a time"
            )
        windows: list[batches.Window] = []
        epochs = math.ceil(self.steps / self.per_epoch)
        if task.stream is not None:
            epochs, self.every = 1, config.evaluation.every or max(1, self.steps // 10)
        for epoch in range(epochs):
            rows = batches.mixture(task.parts, weights, training.seed, epoch) if task.parts else None
            windows += batches.plan(self.lengths, self.buckets, self.per_step, training.seed, epoch, rows)
        self.windows = windows[: self.steps]
        labels = jpeft.param_labels(model)
        groups = {key: labels[key] for key in adapter}
        self._rates = functools.lru_cache(2)(functools.partial(self._block, training, groups))
        self.recipe = recipe(training, self.steps, groups, matrices(model, groups))
        self.transform = self.recipe(model)
        self.on_host = placing.offloads(training, "optimizer")
        self._feed = batches.Batches(task.kind, task.train, training.seed)

    @property
    def shapes(self) -> list[int]:
        """The lengths that batches are padded to: one program each."""
        if self._task.stream is not None:
            return list(self.buckets)
        return sorted({window.length for window in self.windows})

    def rates_at(self, step: int) -> dict[str, np.float32]:
        """The learning rate of each group in the step after `step` others."""
        block, place = divmod(step, _BLOCK)
        return {group: rates[place] for group, rates in self._rates(block).items()}

    def _block(self, training: TrainingConfig, groups: dict[str, str], number: int) -> dict[str, np.ndarray]:
        """The rates of `_BLOCK` steps."""
        return rates(training, self.steps, groups, np.arange(number * _BLOCK, (number + 1) * _BLOCK))

    def windows_from(self, done: int, at: Sequence[int]) -> Iterator[batches.Window]:
        """The rows of each step after `done` of them. at: where a stream then is, [epoch, chunk, window]."""
        if self._task.stream is None:
            return iter(self.windows[done:])
        windows = self._task.stream.windows(at, self.buckets, self.per_step, self._seed)
        return itertools.islice(windows, self.steps - done)

    def examples(self, window: batches.Window) -> list[Example]:
        """The examples of a step."""
        among = window.chunk.examples if isinstance(window, StreamedWindow) else self._task.train
        return [among[row] for row in window.rows]

    def places(self, window: batches.Window) -> Iterator[str]:
        """Where the rows of a step come from."""
        rows = window.chunk.rows if isinstance(window, StreamedWindow) else self._task.train_rows
        return (rows.place(example.row) for example in self.examples(window))

    def batch(self, window: batches.Window, own: np.ndarray | None = None) -> dict[str, Any]:
        """The arrays of a step, [A, B, ...]: A micro-batches of B rows; own: of those rows only these, ascending."""
        places = None
        if own is not None:
            size = self.per_step // self.accumulation
            places = (size * np.arange(self.accumulation)[:, None] + own).ravel().tolist()
        feed = self._feed
        if isinstance(window, StreamedWindow):
            # As wide as the first rows take, unless one is wider: a program more, not one for each chunk.
            kind, first = self._task.kind, feed.width
            width = first if kind.width(self.examples(window)) <= first else self._widest
            chunk = window.chunk
            feed = batches.Batches(kind, chunk.examples, self._seed, chunk=chunk.number, width=width)
        return batches.split(feed(window, self.per_step, places), self.accumulation)

    def sentence(self, evaluation_shapes: int | None = None) -> str:
        """The steps and shapes in a line; further ones for a mixture, and if the steps are fewer than `max_steps`."""
        lengths = ", ".join(map(str, self.shapes))
        most = "at most " if self._task.stream is not None else ""
        programs = f"{most}{len(self.shapes)} program{'s' * (len(self.shapes) > 1)}"
        scored = "" if evaluation_shapes is None else f", {evaluation_shapes} for evaluation"
        return (
            f"steps     {self.steps} of {self.per_step} rows, padded to {lengths} tokens: {programs} "
            f"to compile for training{scored}{self._mixture}{self._short}"
        )


def _mixture(config: Config, counts: Sequence[int]) -> str:
    """What an epoch is mixed of, if it is."""
    if not config.data.mix:
        return ""
    listed = ", ".join(
        f"{n:,} of {name}" for n, name in zip(counts, [config.data.source, *config.data.mix], strict=True)
    )
    return f"\nmixture   {sum(counts):,} rows in an epoch: {listed}"


def steps_of(training: TrainingConfig, per_epoch: int) -> tuple[int, str]:
    """The steps of a run, and a warning if `epochs` ends it before `max_steps`."""
    most, epochs = training.max_steps, training.epochs
    if most is not None and epochs is None:
        return most, ""
    steps = (epochs or 1) * per_epoch
    if most is None or most <= steps:
        return most or steps, ""
    return steps, (
        f"\nwarning   training.max_steps is {most}, but training.epochs={epochs} ends the run after {steps} steps; "
        "leave epochs out to train for max_steps"
    )
