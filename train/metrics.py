"""Metrics by name, from what is right and what was predicted; each from the library that its field uses.

The libraries are imported where they are used, so a run loads those of its own metrics only.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from jpeft.errors import JpeftError

Metric = Callable[[Sequence[Any], Sequence[Any]], float]

# Behind a letter, a digit or a bracket a stroke is no sign: `10-5`, `2-3`.
_NUMBER = re.compile("(?:(?<![\\w)])[-\u2212])?[0-9][0-9,]*(?:\\.[0-9]+)?")


def accuracy(right: Sequence[int], said: Sequence[int]) -> float:
    """The share of rows whose class is right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(right, said))


def macro_f1(right: Sequence[Any], said: Sequence[Any]) -> float:
    """The mean of F1 over the classes that occur; of label sets, over all labels."""
    return _f1(right, said, "macro")


def micro_f1(right: Sequence[Any], said: Sequence[Any]) -> float:
    """F1 over all pairs of a row and a label."""
    return _f1(right, said, "micro")


def f1(right: Sequence[int], said: Sequence[int]) -> float:
    """F1 of the second of two classes. Raises JpeftError if there are more."""
    if {*right, *said} - {0, 1}:
        raise JpeftError("evaluation.metrics: f1 is for two classes, of which it scores the second; use macro_f1")
    return _f1(right, said, "binary")


def matthews(right: Sequence[int], said: Sequence[int]) -> float:
    """Matthews' correlation coefficient; 0 where either has one class only."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():  # it warns where it cannot tell how many classes there are
        warnings.simplefilter("ignore")
        return float(matthews_corrcoef(right, said))


def same_labels(right: Sequence[Any], said: Sequence[Any]) -> float:
    """The share of rows all of whose labels are right and that miss none."""
    return float(np.mean([np.array_equal(one, other) for one, other in zip(right, said, strict=True)]))


def pearson(right: Sequence[float], said: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side is constant, so that nothing can be said of it."""
    return _correlation("pearsonr", right, said)


def spearman(right: Sequence[float], said: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    return _correlation("spearmanr", right, said)


def rmse(right: Sequence[float], said: Sequence[float]) -> float:
    """The root of the mean squared difference, in the labels' units."""
    from sklearn.metrics import root_mean_squared_error

    return float(root_mean_squared_error(right, said))


def mae(right: Sequence[float], said: Sequence[float]) -> float:
    """The mean absolute difference, in the labels' units."""
    from sklearn.metrics import mean_absolute_error

    return float(mean_absolute_error(right, said))


def token_accuracy(right: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> float:
    """The share of words whose tag is right."""
    same = [one == other for row, found in zip(right, said, strict=True) for one, other in zip(row, found, strict=True)]
    return float(np.mean(same))


def span_f1(right: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> float:
    """F1 of spans in BIO tags, as CoNLL counts them: right if begin, end and type are."""
    return float(_spans(right, said).f1)


def span_precision(right: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> float:
    """The share of predicted spans that are right."""
    return float(_spans(right, said).precision)


def span_recall(right: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> float:
    """The share of spans that were found."""
    return float(_spans(right, said).recall)


def exact_match(right: Sequence[str], said: Sequence[str]) -> float:
    """The share of texts that are right but for blanks around them."""
    return float(np.mean([one.strip() == other.strip() for one, other in zip(right, said, strict=True)]))


def last_number(right: Sequence[str], said: Sequence[str]) -> float:
    """The share of texts whose last number is that of the right text, as GSM8K is scored (`1,200.0` is `1200`)."""

    def last(text: str) -> Decimal | None:
        found = _NUMBER.findall(text)
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None

    pairs = [(last(one), last(other)) for one, other in zip(right, said, strict=True)]
    return float(np.mean([one is not None and one == other for one, other in pairs]))


def bleu(right: Sequence[str], said: Sequence[str]) -> float:
    """Corpus BLEU of sacrebleu, 0 to 100 (Post 2018, arXiv:1804.08771)."""
    from sacrebleu.metrics.bleu import BLEU

    return float(BLEU(force=True).corpus_score(_stripped(said), [_stripped(right)]).score)  # texts may be tokenised


def chrf(right: Sequence[str], said: Sequence[str]) -> float:
    """Corpus chrF of sacrebleu, 0 to 100 (Popovic 2015)."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(_stripped(said), [_stripped(right)]).score)


def rouge1(right: Sequence[str], said: Sequence[str]) -> float:
    """The mean F of ROUGE-1, with Porter's stemmer (Lin 2004)."""
    return _rouge("rouge1", right, said)


def rouge2(right: Sequence[str], said: Sequence[str]) -> float:
    """The mean F of ROUGE-2, with Porter's stemmer."""
    return _rouge("rouge2", right, said)


def rouge_l(right: Sequence[str], said: Sequence[str]) -> float:
    """The mean F of ROUGE-L over whole texts, with Porter's stemmer."""
    return _rouge("rougeL", right, said)


LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rmse", "mae"})  # of all others, more is better

# By what is predicted (`Task.measure`), then by name.
METRICS: dict[str, dict[str, Metric]] = {
    "classes": {"accuracy": accuracy, "macro_f1": macro_f1, "f1": f1, "matthews": matthews},
    "sets": {"micro_f1": micro_f1, "macro_f1": macro_f1, "exact_match": same_labels},
    "numbers": {"pearson": pearson, "spearman": spearman, "rmse": rmse, "mae": mae},
    "tags": {
        "span_f1": span_f1,
        "span_precision": span_precision,
        "span_recall": span_recall,
        "token_accuracy": token_accuracy,
    },
    "texts": {
        "exact_match": exact_match,
        "last_number": last_number,
        "bleu": bleu,
        "chrf": chrf,
        "rouge1": rouge1,
        "rouge2": rouge2,
        "rougeL": rouge_l,
    },
}


def _f1(right: Sequence[Any], said: Sequence[Any], average: str) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(np.asarray(right), np.asarray(said), average=average, zero_division=0.0))


def _correlation(name: str, right: Sequence[float], said: Sequence[float]) -> float:
    from scipy import stats

    if len(set(right)) < 2 or len(set(said)) < 2:
        return 0.0
    with warnings.catch_warnings():  # values that hardly differ
        warnings.simplefilter("ignore")
        found = float(getattr(stats, name)(right, said).statistic)
    return found if np.isfinite(found) else 0.0


def _spans(right: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> Any:
    """The counts of spans whose type and ends agree."""
    from nervaluate import Evaluator

    tags = {tag for row in (*right, *said) for tag in row} - {"O"}
    odd = sorted(tag for tag in tags if tag[:2] not in ("B-", "I-"))
    if odd:
        raise JpeftError(f"evaluation.metrics: spans are told from tags such as B-name, I-name and O, not {odd[0]!r}")
    types = sorted({tag[2:] for tag in tags})
    rows = ([list(row) for row in side] for side in (right, said))
    return Evaluator(*rows, tags=types, loader="list").evaluate()["overall"]["strict"]


def _stripped(texts: Sequence[str]) -> list[str]:
    return [text.strip() for text in texts]


def _rouge(kind: str, right: Sequence[str], said: Sequence[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=True)
    return float(np.mean([scorer.score(one, other)[kind].fmeasure for one, other in zip(right, said, strict=True)]))
