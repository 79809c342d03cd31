"""From rows to examples: the rows of a task, its labels, and what is done with rows that do not fit.

A missing column, an unknown label or a row without content is an error with file and line, or is counted and said.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import numpy as np

from jpeft.errors import JpeftError
from train import sources
from train.examples import Example, Reader
from train.files import Rows
from train.schema import DataConfig
from train.streams import Stream, Streamed
from train.tasks import Task, check_columns, task_of


@dataclasses.dataclass(frozen=True)
class TaskData:
    """What a run trains on and is scored by.

    kind: the task, with its labels. counts: what was cut or left out, by set. parts: how many of `train` are of each
    source, in order, if `data.mix` names several. stream: where `train` is only what was read first.
    """

    kind: Task
    train: list[Example]
    test: list[Example]
    train_rows: Rows
    test_rows: Rows
    counts: dict[str, Counter[str]]
    parts: tuple[int, ...] = ()
    stream: Streamed | None = None

    @functools.cached_property
    def asked(self) -> list[str]:
        """What each held-out example asks, as it reads."""
        return [self.kind.asked(row) for row in self._rows]

    @functools.cached_property
    def right(self) -> list[Any]:
        """What is right for each held-out example, as metrics take it."""
        return [self.kind.right(example, row) for example, row in zip(self.test, self._rows, strict=True)]

    def shown(self, values: list[Any]) -> list[str]:
        """How one value in the form of `right` for each held-out example reads."""
        return [self.kind.shown(value, row) for value, row in zip(values, self._rows, strict=True)]

    def guesses(self, outputs: list[Any]) -> list[Any]:
        """What the model's output for each held-out example is, as metrics take it."""
        rows = zip(outputs, self.test, self._rows, strict=True)
        return [self.kind.guess(output, example, row) for output, example, row in rows]

    @functools.cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [self.test_rows.dataset[example.row] for example in self.test]


def read(data: DataConfig, head: str | None = None) -> tuple[DataConfig, Rows, Rows]:
    """(`data` with its labels filled in, training rows, held-out rows), checked; nothing is tokenised yet.

    head: the configuration's `model.task`. Raises JpeftError with file and line of what cannot be used.
    """
    task = task_of(data, head)
    train, test = rows_of(data, task)
    for rows in (train, test):
        check_columns(task, rows)
    if data.streaming and "labels" in task.settings and data.labels is None and not _names_labels(data, train):
        raise JpeftError(
            f"data.labels: the labels of {data.source} cannot be found in rows that are not read yet; give them all, "
            "data.labels=[...], or leave data.streaming out"
        )
    labels = task.find_labels(train)
    if labels:
        data = data.model_copy(update={"labels": list(labels)})
        task = task_of(data, head)
    for rows in (train, test):
        task.check(rows)
    return data, train, test


def _names_labels(data: DataConfig, rows: Rows) -> bool:
    """Whether the label's column says itself which labels there are."""
    feature = rows.dataset.features[str(data.label or data.tags)]
    return bool(getattr(getattr(feature, "feature", feature), "names", None))


def rows_of(data: DataConfig, task: Task) -> tuple[Rows, Rows]:
    """(training rows of all sources, held-out rows of `data.source`), not checked beyond what it takes to mix them."""
    if data.streaming:
        stream = Stream(data)
        test = sources.held_out(data)
        return stream.first(), sources.limited(data, stream.held_out() if test is None else test)
    train, test = sources.load(data)
    return sources.mixed(data, train, [name for names in task.columns().values() for name in names]), test


def prepare(task: Task, train: Rows, test: Rows, tokenizer: Any, max_length: int, *, types: bool) -> TaskData:
    """Tokenised examples of both sets, at most `max_length` tokens each; types: whether the model takes token types.

    Raises JpeftError where a set has nothing left.
    """
    counts: dict[str, Counter[str]] = {}
    made: dict[str, list[Example]] = {}
    parts: list[int] = []

    def new_reader() -> Reader:
        return Reader(tokenizer, max_length, types=types)

    for name, rows in (("training", train), ("held-out", test)):
        reader = new_reader()
        if rows.origins is None:
            made[name] = task.examples(rows, reader)
        else:
            each = [_examples_of(task, rows, origin, reader) for origin in range(1 + len(task.data.mix or ()))]
            made[name] = [example for examples in each for example in examples]
            parts = [len(examples) for examples in each]
        counts[name] = +reader.counts
        if not made[name] or 0 in parts:
            said = "; ".join(f"{count} {what}" for what, count in counts[name].items()) or "there are none"
            first = f" of the first {len(rows)} (data.chunk reads more at a time)" if rows.stream is not None else ""
            raise JpeftError(f"{rows.name}: no {name} rows are left{first}: {said}")
    stream = None if train.stream is None else Streamed(train.stream, task, new_reader)
    return TaskData(task, made["training"], made["held-out"], train, test, counts, tuple(parts), stream)


def _examples_of(task: Task, rows: Rows, origin: int, reader: Reader) -> list[Example]:
    """The examples of one of the sources that `rows` are mixed of; none of them is packed with those of another."""
    assert rows.origins is not None
    chosen = np.flatnonzero(rows.origins == origin)
    examples = task.examples(rows.select(chosen), reader)
    return [dataclasses.replace(example, row=int(chosen[example.row])) for example in examples]
