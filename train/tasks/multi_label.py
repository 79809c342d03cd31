"""Any number of labels for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jpeft.errors import JpeftError
from train.examples import Example
from train.files import Rows
from train.step import inputs
from train.tasks.classification import SequenceTask, given_labels, label_numbers, labels_in
from train.tasks.task import Arrays


class MultiLabel(SequenceTask):
    """Binary cross-entropy, the mean over the labels; a label is predicted where its probability is above a half."""

    name = "multi-label"
    settings = ("labels", "problem_type")
    lists = ("label",)
    problem_type = "multi-label"
    measure = "sets"
    metrics = ("micro_f1", "macro_f1", "exact_match")

    def find_labels(self, train: Rows) -> tuple[str, ...]:
        if self.data.labels is not None:
            return given_labels(self.data.labels)
        names = self._names(train)
        if names:
            return tuple(names)
        column = str(self.data.label)
        return labels_in([label for row in train.dataset[column] for label in row or ()], column, train.name)

    def _names(self, rows: Rows) -> Sequence[str] | None:
        feature = rows.dataset.features[str(self.data.label)]
        return getattr(getattr(feature, "feature", None), "names", None)

    def label(self, rows: Rows) -> Callable[[Any, int], np.ndarray]:
        number = label_numbers(self.labels, self._names(rows), rows)

        def label(value: Any, index: int) -> np.ndarray:
            if value is None:
                raise JpeftError(
                    f"{rows.place(index)}: the labels are missing: column {self.data.label!r} is null; write an empty "
                    "list where there are none"
                )
            made = np.zeros(len(self.labels), np.float32)
            made[[number(one, index) for one in value]] = 1.0
            return made

        return label

    @staticmethod
    def targets(examples: Sequence[Example], length: int, width: int) -> dict[str, np.ndarray]:
        labels = np.stack([example.label for example in examples])
        return {"labels": labels, "weights": np.ones(len(examples), np.float32)}

    @staticmethod
    def losses(model: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        logits = model(**inputs(batch)).astype(jnp.float32)
        each = optax.sigmoid_binary_cross_entropy(logits, batch["labels"]).mean(-1)
        return each * batch["weights"], logits > 0

    def guess(self, output: np.ndarray, example: Example, row: Mapping[str, Any]) -> np.ndarray:
        return output

    def right(self, example: Example, row: Mapping[str, Any]) -> np.ndarray:
        return example.label > 0

    def shown(self, value: Any, row: Mapping[str, Any]) -> str:
        return ", ".join(label for label, chosen in zip(self.labels, value, strict=True) if chosen) or "-"

    def answer(self, logits: np.ndarray) -> str:
        shares = np.asarray(jax.nn.sigmoid(logits))
        chosen = [f"{label} {share:.3f}" for label, share in zip(self.labels, shares, strict=True) if share > 0.5]
        return "  ".join(chosen) or f"-  (likeliest: {self.labels[int(shares.argmax())]} {shares.max():.3f})"
