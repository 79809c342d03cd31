"""Scores on held-out rows: loss over what is to be learnt, accuracy, exact match, and the answers themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import jpeft
from jpeft.errors import JpeftError
from train import batches, session
from train.data import TaskData
from train.examples import Reader
from train.schema import EvaluationConfig
from train.step import make_scorer

_MOST_CHOICES = 32


@dataclasses.dataclass(frozen=True)
class Score:
    """metrics: by name, the first one the most telling. answers: what the model said to each held-out example."""

    metrics: dict[str, float]
    answers: list[str]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())


class Evaluator:
    """Scores an adapter on the held-out rows of a task.

    parts: `(graphdef, buffers, frozen)` of the partitioned model. buckets: lengths to pad to. batch_size: rows at once.
    """

    def __init__(
        self,
        parts: tuple[Any, Any, Any],
        task: TaskData,
        reader: Reader,
        evaluation: EvaluationConfig,
        buckets: Sequence[int],
        batch_size: int,
    ):
        self._graphdef, self._buffers, self._frozen = parts
        self._task, self._reader, self._evaluation = task, reader, evaluation
        self._buckets, self._batch_size = buckets, batch_size
        self._score = make_scorer(self._graphdef, task.form)
        self._targets = max(1, batches.most_targets(task.test))
        # Tokens to write before an answer counts as not ending: the longest right one, and its end.
        longest = max((int(example.targets.sum()) for example in task.test), default=1)
        self._answer_tokens = longest + 1
        if self.answers == "choose" and len(task.choices) > _MOST_CHOICES:
            raise JpeftError(
                f"evaluation.answers: choose scores every completion of the training rows, of which there are "
                f"{len(task.choices)} (at most {_MOST_CHOICES}); use generate"
            )

    @property
    def answers(self) -> str:
        """How answers are found: "generate", "choose" or "none"."""
        return self._evaluation.answers if self._task.form == "completion" else "none"

    @property
    def shapes(self) -> int:
        """How many shapes of batches there are."""
        return len({window.length for window in self._windows(self._task.test)})

    def __call__(self, adapter: Any, *, answers: bool = True) -> Score:
        """The score of `adapter`; with `answers=False`, without writing answers to prompts, which takes longest."""
        losses, weights, classes = self._run(adapter, self._task.test)
        mean = float(losses.sum() / max(1.0, weights.sum()))
        if self._task.form == "classification":
            right = np.array([example.label for example in self._task.test])
            metrics = {"accuracy": float(np.mean(classes == right)), "macro_f1": macro_f1(right, classes), "loss": mean}
            return Score(metrics, [self._task.labels[index] for index in classes])
        metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
        if self.answers == "none" or not answers:
            return Score(metrics, [])
        said = self._choose(adapter) if self.answers == "choose" else self._generate(adapter)
        wanted = self._task.wanted
        match = float(np.mean([a.strip() == b.strip() for a, b in zip(said, wanted, strict=True)]))
        return Score({"exact_match": match, **metrics}, said)

    def _windows(self, examples: Sequence[Any]) -> list[batches.Window]:
        return batches.in_order([len(example) for example in examples], self._buckets, self._batch_size)

    def _run(self, adapter: Any, examples: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per example: summed loss, weight, predicted class."""
        losses, weights = np.zeros(len(examples)), np.zeros(len(examples))
        classes = np.zeros(len(examples), np.int64)
        for window in self._windows(examples):
            rows = list(window.rows)
            batch = batches.arrays(examples, window, self._batch_size, self._targets)
            loss, weight, found = jax.device_get(self._score(adapter, self._buffers, self._frozen, batch))
            losses[rows], weights[rows], classes[rows] = loss[: len(rows)], weight[: len(rows)], found[: len(rows)]
        return losses, weights, classes

    def _choose(self, adapter: Any) -> list[str]:
        choices = self._task.choices
        asked = self._task.asked
        examples = [
            example for prompt in asked for choice in choices for example in self._reader.completion(prompt, choice, 0)
        ]
        if len(examples) != len(asked) * len(choices):
            raise JpeftError("evaluation.answers: choose: a prompt with a completion is longer than data.max_length")
        losses = self._run(adapter, examples)[0].reshape(-1, len(choices))
        return [choices[index] for index in losses.argmin(1)]

    def _generate(self, adapter: Any) -> list[str]:
        model = jpeft.combine(self._graphdef, adapter, self._buffers, self._frozen)
        # What stands before the first learnt token: the same ids, cut in the same way, as in training.
        prompts = [example.ids[: max(1, int(np.argmax(example.targets)))] for example in self._task.test]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        said = [""] * len(prompts)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            padded = rows + rows[:1] * (self._batch_size - len(rows))  # one shape, also for the last batch
            chosen = [prompts[row] for row in padded]
            room = (session.context(model) or math.inf) - max(len(prompt) for prompt in chosen)
            made = generate_texts(model, self._reader, chosen, max(1, int(min(self._answer_tokens, room))))
            for row, text in zip(rows, made, strict=False):
                said[row] = text
        return said


def generate_texts(
    model: Any,
    reader: Reader,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    chat: bool = False,
    **sampling: Any,
) -> list[str]:
    """What the model writes after each prompt (token ids), up to its end token or, in a chat, the end of its turn."""
    ends = reader.ends(chat=chat)
    length = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    made = jpeft.generate(model, ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=ends, **sampling)
    texts = []
    for row in np.asarray(made):
        new = [int(token) for token in row[length:]]
        end = next((at for at, token in enumerate(new) if token in ends), len(new))
        texts.append(reader.tokenizer.decode(new[:end], skip_special_tokens=True))
    return texts


def macro_f1(right: np.ndarray, said: np.ndarray) -> float:
    """The mean over the classes that occur of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for label in np.union1d(right, said):
        hits = int(np.sum((right == label) & (said == label)))
        scores.append(2 * hits / int(np.sum(right == label) + np.sum(said == label)))
    return float(np.mean(scores))
