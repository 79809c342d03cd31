"""What a task says of itself: the columns it reads, how a row becomes an example, its loss, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from jpeft.errors import JpeftError
from train.examples import Example, Reader
from train.files import Rows, kind_of, kind_of_feature
from train.schema import DataConfig

if TYPE_CHECKING:
    from train.session import Run

Arrays = dict[str, jax.Array]
Read = Callable[[dict[str, Any], int], list[Example]]


class Task:
    """One kind of rows, and what is learnt from them. A value of the `data:` section of a configuration.

    name: as in `TASKS`. head: the `task` of `jpeft.models.load`. required: keys of `data:` that name its columns, the
    first of which tells it from other tasks; optional: further ones that it can use; settings: keys of `data:` that
    name no column. lists: keys whose columns hold lists.

    measure: what its predictions are to a metric, a key of `train.metrics.METRICS`, or None if nothing is predicted.
    metrics: the default ones, the most telling first. writes: whether predictions are texts that the model writes.
    """

    name: ClassVar[str]
    head: ClassVar[str]
    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    lists: ClassVar[tuple[str, ...]] = ()
    measure: ClassVar[str | None] = None
    metrics: ClassVar[tuple[str, ...]]
    writes: ClassVar[bool] = False

    def __init__(self, data: DataConfig):
        self.data = data

    @classmethod
    def described_by(cls, data: DataConfig) -> bool:
        """Whether rows as in `data` can be for this task."""
        return getattr(data, cls.required[0]) is not None

    @classmethod
    def data_keys(cls) -> tuple[str, ...]:
        """All keys of `data:` that are about its rows."""
        return (*cls.required, *cls.optional, *cls.settings)

    # Rows

    @property
    def labels(self) -> tuple[str, ...]:
        """The names that a label can have, in order; `()` if there are none."""
        return tuple(self.data.labels or ())

    @property
    def outputs(self) -> int | None:
        """How many outputs a new head has; None where the checkpoint has the head."""
        return len(self.labels) or None

    @property
    def saved_config(self) -> dict[str, Any]:
        """What config.json of a merged model says of the task, as transformers reads it."""
        names = {str(number): label for number, label in enumerate(self.labels)}
        return {"id2label": names, "label2id": {label: int(number) for number, label in names.items()}} if names else {}

    def columns(self) -> dict[str, tuple[str, ...]]:
        """The columns that each key of `data:` names."""
        keys = (*self.required, *self.optional)
        return {key: (getattr(self.data, key),) for key in keys if getattr(self.data, key) is not None}

    def find_labels(self, train: Rows) -> tuple[str, ...]:
        """The names of the labels, given or found in the training rows."""
        return ()

    def check(self, rows: Rows) -> None:
        """Raises JpeftError with file and line of the first row that cannot be used; nothing is tokenised for it."""

    def reader(self, rows: Rows, reader: Reader) -> Read:
        """The function (row, its number) -> its examples; `reader` tokenises and counts what did not fit."""
        raise NotImplementedError

    def examples(self, rows: Rows, reader: Reader) -> list[Example]:
        """All examples of a set, in the order of its rows."""
        read = self.reader(rows, reader)
        return [example for index, row in enumerate(rows.dataset) for example in read(row, index)]

    def check_model(self, model: Any) -> None:
        """Raises JpeftError where the adapted model cannot take such rows."""

    # Loss

    draws: ClassVar[bool] = False  # whether `drawn` changes examples

    @staticmethod
    def drawn(example: Example, random: np.random.Generator) -> Example:
        """The example as it is in one epoch; whatever is drawn for it comes from `random`."""
        return example

    @staticmethod
    def width(examples: Sequence[Example]) -> int:
        """The least size of the second axis of `targets` that holds any of these examples."""
        return 1

    @staticmethod
    def targets(examples: Sequence[Example], length: int, width: int) -> dict[str, np.ndarray]:
        """What is to be learnt from B examples, as arrays [B, ...]; length: of the rows they are padded to.

        Among them `weights`, float32 [B]: how much there is to learn from each, by which the loss is divided.
        """
        raise NotImplementedError

    @staticmethod
    def losses(model: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        """(loss of each row [B], summed over what is learnt and zero where the weight is, predictions [B, ...])."""
        raise NotImplementedError

    # Scores

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """The metrics of a run that names none."""
        return self.metrics

    def guess(self, output: np.ndarray, example: Example, row: Mapping[str, Any]) -> Any:
        """What the model's prediction for an example is to a metric."""
        raise NotImplementedError

    def right(self, example: Example, row: Mapping[str, Any]) -> Any:
        """What is right for an example, in the form of `guess`."""
        raise NotImplementedError

    def shown(self, value: Any, row: Mapping[str, Any]) -> str:
        """How a guess or what is right reads."""
        return str(value)

    def asked(self, row: Mapping[str, Any]) -> str:
        """How the question that a row puts reads."""
        return ""

    def agree(self, said: Sequence[str], wanted: Sequence[str]) -> list[bool]:
        """Which answers are right, all as they read."""
        return [one.strip() == other.strip() for one, other in zip(said, wanted, strict=True)]

    # Use

    asked_as: ClassVar[str] = "prompt"  # what a question is called in a table

    def example_prompt(self, row: Mapping[str, Any]) -> tuple[str, bool] | None:
        """A prompt to try a finished run with, and whether it is the whole prompt already.

        None if one text is not enough.
        """
        return None

    def example_pair(self, row: Mapping[str, Any]) -> str | None:
        """The second text that goes with `example_prompt`, if the run takes pairs."""
        return None

    def answers(self, run: Run, prompts: Sequence[str], **settings: Any) -> Iterator[str]:
        """What a finished run says to each prompt. settings: see `train.use.generate`."""
        raise JpeftError(f"the run's task is {self.name}, for which one prompt is not enough; use it from Python")


def missing(value: Any) -> bool:
    """Whether a field of a row holds nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


def text_of(value: Any) -> str:
    """A field of a row as text."""
    return "" if value is None else str(value)


def check_columns(task: Task, rows: Rows) -> None:
    """Raises JpeftError for columns that are not there, or hold lists, objects or bytes where text is needed."""
    import datasets

    columns = task.columns()
    rows.require(dict.fromkeys(column for names in columns.values() for column in names))
    for key, names in columns.items():
        for column in names:
            feature = rows.dataset.features[column]
            binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
            plain = isinstance(feature, datasets.Value | datasets.ClassLabel) and not binary
            if key not in task.lists and plain:
                continue
            values = enumerate(rows.dataset.with_format(None)[column])
            at, value = next(((i, v) for i, v in values if v is not None), (0, None))
            if key in task.lists:
                if isinstance(value, list) or (value is None and kind_of_feature(feature) == "a list"):
                    continue
                raise JpeftError(
                    f"{rows.place(at)}: column {column!r}, which data.{key} uses, holds {kind_of(value)}, not a list"
                )
            hint = " (lists of labels need data.problem_type: multi-label)" * (
                key == "label" and isinstance(value, list)
            )
            raise JpeftError(
                f"{rows.place(at)}: column {column!r}, which data.{key} uses, holds {kind_of(value)}, not "
                f"text; make it text in the file, or name another column{hint}"
            )
