"""A number for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.errors import JpeftError
from train.examples import Example
from train.files import Rows
from train.step import inputs
from train.tasks.classification import SequenceTask
from train.tasks.task import Arrays, missing


class Regression(SequenceTask):
    """Squared error of the head's one output, in the labels' units: large numbers are better scaled in the file."""

    name = "regression"
    settings = ("problem_type",)
    problem_type = "regression"
    measure = "numbers"
    metrics = ("pearson", "spearman", "rmse")
    outputs = 1

    def label(self, rows: Rows) -> Callable[[Any, int], float]:
        def label(value: Any, index: int) -> float:
            try:
                number = math.nan if missing(value) else float(value)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise JpeftError(f"{rows.place(index)}: column {self.data.label!r} holds {value!r}, not a number")
            return number

        return label

    @staticmethod
    def targets(examples: Sequence[Example], length: int, width: int) -> dict[str, np.ndarray]:
        labels = np.array([example.label for example in examples], np.float32)
        return {"labels": labels, "weights": np.ones(len(examples), np.float32)}

    @staticmethod
    def losses(model: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        found = model(**inputs(batch)).astype(jnp.float32)[:, 0]
        return jnp.square(found - batch["labels"]) * batch["weights"], found

    def guess(self, output: np.ndarray, example: Example, row: Mapping[str, Any]) -> float:
        return float(output)

    def right(self, example: Example, row: Mapping[str, Any]) -> float:
        return float(example.label)

    def shown(self, value: Any, row: Mapping[str, Any]) -> str:
        return f"{value:.4g}"

    def agree(self, said: Sequence[str], wanted: Sequence[str]) -> list[bool]:
        """Right is what is off by at most a tenth of the range of what is wanted."""
        found, right = np.array([float(one) for one in said]), np.array([float(one) for one in wanted])
        return [bool(near) for near in np.abs(found - right) <= 0.1 * np.ptp(right)]

    def answer(self, logits: np.ndarray) -> str:
        return f"{logits[0]:.4g}"
