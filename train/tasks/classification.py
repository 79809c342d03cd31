"""One class of several for a text or a pair of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jpeft.errors import JpeftError, nearest
from train.batches import IGNORED, arrays, edges
from train.examples import Example, Reader
from train.files import Rows
from train.schema import DataConfig
from train.step import inputs
from train.tasks.task import Arrays, Read, Task, missing, text_of

if TYPE_CHECKING:
    from train.session import Run


class SequenceTask(Task):
    """What all labels of whole texts share: a text or a pair, and the label's column."""

    head = "sequence-classification"
    required = ("label", "text")
    optional = ("text_pair",)
    asked_as = "text"
    problem_type: ClassVar[str]  # the value of `data.problem_type` that tells it from the others

    @classmethod
    def described_by(cls, data: DataConfig) -> bool:
        return super().described_by(data) and (data.problem_type or "single-label") == cls.problem_type

    @property
    def saved_config(self) -> dict[str, Any]:
        theirs = {"single-label": "single_label_classification", "multi-label": "multi_label_classification"}
        return {**super().saved_config, "problem_type": theirs.get(self.problem_type, self.problem_type)}

    def label(self, rows: Rows) -> Callable[[Any, int], Any]:
        """The function (value of the label's column, row) -> label of an example."""
        raise NotImplementedError

    def check(self, rows: Rows) -> None:
        label = self.label(rows)
        for index, value in enumerate(rows.dataset[str(self.data.label)]):
            label(value, index)

    def reader(self, rows: Rows, reader: Reader) -> Read:
        data, label = self.data, self.label(rows)

        def read(row: dict[str, Any], index: int) -> list[Example]:
            pair = None if data.text_pair is None else text_of(row[data.text_pair])
            reader.counts["rows without the second text, used with the first alone"] += pair == ""
            return reader.classification(text_of(row[str(data.text)]), pair, label(row[str(data.label)], index), index)

        return read

    def asked(self, row: Mapping[str, Any]) -> str:
        return "\n".join(text_of(row[key]) for key in (self.data.text, self.data.text_pair) if key is not None)

    def example_prompt(self, row: Mapping[str, Any]) -> tuple[str, bool] | None:
        return _beginning(row[str(self.data.text)]), False

    def example_pair(self, row: Mapping[str, Any]) -> str | None:
        return None if self.data.text_pair is None else _beginning(row[self.data.text_pair])

    def answers(
        self, run: Run, prompts: Sequence[str], *, pairs: Sequence[str] | None = None, **settings: Any
    ) -> Iterator[str]:
        seconds: Sequence[str | None] = pairs or [None] * len(prompts)
        examples = [
            example
            for row, (text, pair) in enumerate(zip(prompts, seconds, strict=True))
            for example in run.reader.classification(text, pair, None, row)
        ]
        length = edges([len(example) for example in examples], 1)[-1]
        logits = run.model(**inputs(arrays(examples, length, len(examples))))
        for row in np.asarray(logits.astype(np.float32)):
            yield self.answer(row)

    def answer(self, logits: np.ndarray) -> str:
        """What logits [C] of a text say."""
        raise NotImplementedError


def _beginning(value: Any) -> str:
    """The first words of a text."""
    return " ".join(text_of(value).split()[:12])


class Classification(SequenceTask):
    """Cross-entropy over the classes."""

    name = "classification"
    settings = ("labels", "problem_type")
    problem_type = "single-label"
    measure = "classes"
    metrics = ("accuracy", "macro_f1")

    def find_labels(self, train: Rows) -> tuple[str, ...]:
        data = self.data
        if data.labels is not None:
            return given_labels(data.labels)
        names = getattr(train.dataset.features[str(data.label)], "names", None)
        return tuple(names) if names else labels_in(train.dataset[str(data.label)], str(data.label), train.name)

    def label(self, rows: Rows) -> Callable[[Any, int], int]:
        column = str(self.data.label)
        number = label_numbers(self.labels, getattr(rows.dataset.features[column], "names", None), rows)

        def label(value: Any, index: int) -> int:
            if missing(value):
                raise JpeftError(
                    f"{rows.place(index)}: the label is missing: column {column!r} is empty; fill it, or leave the "
                    "row out"
                )
            return number(value, index)

        return label

    @staticmethod
    def targets(examples: Sequence[Example], length: int, width: int) -> dict[str, np.ndarray]:
        labels = np.array([IGNORED if example.label is None else example.label for example in examples], np.int32)
        return {"labels": labels, "weights": (labels != IGNORED).astype(np.float32)}

    @staticmethod
    def losses(model: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        logits = model(**inputs(batch)).astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["labels"], 0))
        return each * batch["weights"], jnp.argmax(logits, -1)

    def guess(self, output: np.ndarray, example: Example, row: Mapping[str, Any]) -> int:
        return int(output)

    def right(self, example: Example, row: Mapping[str, Any]) -> int:
        return int(example.label)

    def shown(self, value: Any, row: Mapping[str, Any]) -> str:
        return self.labels[value]

    def answer(self, logits: np.ndarray) -> str:
        shares = np.asarray(jax.nn.softmax(logits))
        return f"{self.labels[int(shares.argmax())]}  {shares.max():.3f}"


def given_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """`data.labels`. Raises JpeftError for a name that is given twice."""
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise JpeftError(f"data.labels: {twice[0]!r} is given twice")
    return tuple(labels)


def labels_in(values: Sequence[Any], column: str, name: str) -> tuple[str, ...]:
    """The different labels among the values of a column, numbers in their order.

    Raises JpeftError, naming the file `name`, if they are too few or too many to be labels.
    """
    found = {value for value in values if not missing(value)}
    if len(found) < 2:
        raise JpeftError(f"{name}: column {column!r} has {len(found)} different labels in the training rows; 2 needed")
    if len(found) > 1000:
        raise JpeftError(
            f"{name}: column {column!r} has {len(found)} different values; is it the label? (Numbers to be "
            "predicted need data.problem_type: regression)"
        )
    if all(isinstance(value, int | float) for value in found):
        return tuple(str(value) for value in sorted(found))
    names = sorted(map(str, found))
    whole = all(re.fullmatch("-?[0-9]{1,9}", name) for name in names)  # as text files write the numbers of classes
    return tuple(sorted(names, key=int) if whole else names)


def label_numbers(labels: Sequence[str], names: Sequence[str] | None, rows: Rows) -> Callable[[Any, int], int]:
    """The function (a label as it stands in a row, the row's number) -> its number.

    names: of a column that holds numbers of them (`datasets.ClassLabel`).
    """
    classes = {label: number for number, label in enumerate(labels)}

    def number(value: Any, index: int) -> int:
        name = names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)
        if name not in classes:
            raise JpeftError(
                f"{rows.place(index)}: unknown label {name!r}; the labels are {', '.join(classes)}; nearest: "
                f"{', '.join(nearest(name, classes, 3))} (data.labels sets them)"
            )
        return classes[name]

    return number
