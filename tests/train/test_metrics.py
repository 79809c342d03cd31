"""Metrics against values worked out by hand, and where a library would warn or give no number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from jpeft import JpeftError
from train.metrics import METRICS

SETS = (np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0]], bool), np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1]], bool))
# Of three spans one is found whole, one with a wrong end, one not at all; I-b without a beginning is a span too.
TAGS = (
    [["B-a", "I-a", "O", "B-b"], ["O", "B-b", "I-b"]],
    [["B-a", "I-a", "O", "O"], ["O", "I-b", "O"]],
)
TEXTS = (["the cat sat on the mat", "yes"], [" the cat sat on the mat\n", "no"])


@pytest.mark.parametrize(
    ("kind", "name", "given", "value"),
    [
        ("classes", "accuracy", ([0, 1, 1, 1], [0, 1, 0, 1]), 3 / 4),
        ("classes", "f1", ([0, 1, 1, 1], [0, 1, 0, 1]), 4 / 5),
        ("classes", "macro_f1", ([0, 1, 1, 1], [0, 1, 0, 1]), (2 / 3 + 4 / 5) / 2),
        ("classes", "macro_f1", ([0, 0], [2, 0]), (2 / 3 + 0) / 2),
        ("classes", "matthews", ([0, 1, 1, 1], [0, 1, 0, 1]), 2 / math.sqrt(12)),
        ("classes", "matthews", ([1, 1], [1, 1]), 0.0),
        ("classes", "f1", ([0, 0], [0, 0]), 0.0),
        ("sets", "exact_match", SETS, 1 / 3),
        ("sets", "micro_f1", SETS, 6 / 8),
        ("sets", "macro_f1", SETS, (1 + 1 + 0) / 3),
        ("numbers", "pearson", ([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]), 7 / math.sqrt(52)),
        ("numbers", "spearman", ([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]), 1.0),
        ("numbers", "pearson", ([1.0, 2.0], [3.0, 3.0]), 0.0),
        ("numbers", "rmse", ([1.0, 2.0], [1.0, 4.0]), math.sqrt(2)),
        ("numbers", "mae", ([1.0, 2.0], [1.0, 4.0]), 1.0),
        ("tags", "span_precision", TAGS, 1 / 2),
        ("tags", "span_recall", TAGS, 1 / 3),
        ("tags", "span_f1", TAGS, 2 / 5),
        ("tags", "span_f1", (TAGS[0], [["O"] * 4, ["O"] * 3]), 0.0),
        ("tags", "token_accuracy", TAGS, 4 / 7),
        ("texts", "exact_match", TEXTS, 1 / 2),
        ("texts", "last_number", (["so #### 1,200", "2 + 3 = 5.", "7", "-1"], ["1200.0", "5 of 6", "no", "-1"]), 2 / 4),
        ("texts", "last_number", (["5", "3", "-5", "9" * 400], ["10-5", "(2)-3", "\u22125", "8" * 400]), 3 / 4),
        ("texts", "rouge1", TEXTS, 1 / 2),
        ("texts", "rouge2", TEXTS, 1 / 2),
        ("texts", "rougeL", (["the cats sat"], ["the cat"]), 4 / 5),
        ("texts", "bleu", ([TEXTS[0][0]], [TEXTS[1][0]]), 100.0),
        ("texts", "chrf", ([TEXTS[0][0]], [TEXTS[1][0]]), 100.0),
        ("texts", "bleu", (["yes"], [""]), 0.0),
    ],
)
def test_values(kind: str, name: str, given: Any, value: float) -> None:
    found = METRICS[kind][name](*given)
    assert type(found) is float
    assert found == pytest.approx(value, abs=1e-9)


def test_what_a_metric_is_not_for() -> None:
    with pytest.raises(JpeftError, match="f1 is for two classes"):
        METRICS["classes"]["f1"]([0, 1, 2], [0, 1, 1])
    with pytest.raises(JpeftError, match="such as B-name, I-name and O, not 'NOUN'"):
        METRICS["tags"]["span_f1"]([["NOUN"]], [["O"]])
