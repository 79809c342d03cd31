"""Metrics by name, from what is right and what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Metric = Callable[[Sequence[Any], Sequence[Any]], float]


def accuracy(right: Sequence[int], said: Sequence[int]) -> float:
    """The share of rows whose class is right."""
    return float(np.mean(np.asarray(right) == np.asarray(said)))


def macro_f1(right: Sequence[int], said: Sequence[int]) -> float:
    """The mean over the classes that occur of F1 = 2 TP / (2 TP + FP + FN)."""
    wanted, found = np.asarray(right), np.asarray(said)
    scores = []
    for label in np.union1d(wanted, found):
        hits = int(np.sum((wanted == label) & (found == label)))
        scores.append(2 * hits / int(np.sum(wanted == label) + np.sum(found == label)))
    return float(np.mean(scores))


def exact_match(right: Sequence[str], said: Sequence[str]) -> float:
    """The share of texts that are right but for blanks around them."""
    return float(np.mean([one.strip() == other.strip() for one, other in zip(right, said, strict=True)]))


# By what is predicted (`Task.measure`), then by name.
METRICS: dict[str, dict[str, Metric]] = {
    "classes": {"accuracy": accuracy, "macro_f1": macro_f1},
    "texts": {"exact_match": exact_match},
}
