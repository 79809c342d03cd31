"""Scores on held-out rows: loss over what is to be learnt, accuracy, exact match, and the answers themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import jpeft
from jpeft.errors import JpeftError
from train import batches, placing, processes, session
from train.data import TaskData
from train.examples import Reader
from train.generation import generate_texts
from train.metrics import METRICS
from train.schema import EvaluationConfig
from train.step import make_scorer
from train.tasks.completion import Completion

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
    mesh: over which model and batches are spread. `between` is called before each batch.
    """

    def __init__(
        self,
        parts: tuple[Any, Any, Any],
        task: TaskData,
        reader: Reader,
        evaluation: EvaluationConfig,
        buckets: Sequence[int],
        batch_size: int,
        mesh: Mesh | None = None,
    ):
        self._graphdef, self._buffers, self._frozen = parts
        self._task, self._reader, self._evaluation = task, reader, evaluation
        self._buckets, self._batch_size, self._mesh = buckets, batch_size, mesh
        self.between: Callable[[], None] = lambda: None
        self._score = make_scorer(self._graphdef, task.kind)
        # Tokens to write before an answer counts as not ending: the longest right one, and its end.
        if isinstance(task.kind, Completion):
            self._writer = task.kind
            self._answer_tokens = 1 + max(map(self._writer.learnt, task.test))
        if self.answers == "choose" and task.stream is not None:
            raise JpeftError(
                "evaluation.answers: choose scores every completion of the training rows, which data.streaming "
                "reads later; use generate"
            )
        self._choices = self._writer.choices(task.train_rows) if self.answers == "choose" else ()
        if len(self._choices) > _MOST_CHOICES:
            raise JpeftError(
                f"evaluation.answers: choose scores every completion of the training rows, of which there are "
                f"{len(self._choices)} (at most {_MOST_CHOICES}); use generate"
            )

    @property
    def answers(self) -> str:
        """How texts to answer with are found: "generate", "choose" or "none"."""
        return self._evaluation.answers if self._task.kind.writes else "none"

    @property
    def shapes(self) -> int:
        """How many shapes of batches there are."""
        return len({window.length for window in self._windows(self._task.test)})

    def __call__(self, adapter: Any, *, answers: bool = True) -> Score:
        """The score of `adapter`; with `answers=False`, without writing answers to prompts, which takes longest."""
        kind, test = self._task.kind, self._task.test
        losses, weights, outputs = self._run(adapter, test)
        mean = float(losses.sum() / max(1.0, weights.sum()))
        said: list[Any] = []
        if kind.writes and answers and self.answers != "none":
            said = self._choose(adapter) if self.answers == "choose" else self._generate(adapter)
        elif kind.measure is not None and not kind.writes:
            said = self._task.guesses(outputs)
        metrics = {}
        for name in self._evaluation.metrics or kind.default_metrics:
            if name in ("loss", "perplexity"):
                metrics[name] = mean if name == "loss" else math.exp(min(mean, 700.0))
            elif said and kind.measure is not None:
                metrics[name] = METRICS[kind.measure][name](self._task.right, said)
        return Score({**metrics, "loss": mean}, self._task.shown(said) if said else [])

    def _windows(self, examples: Sequence[Any]) -> list[batches.Window]:
        return batches.in_order([len(example) for example in examples], self._buckets, self._batch_size)

    def _run(self, adapter: Any, examples: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Per example: summed loss, weight, what was predicted."""
        losses, weights = np.zeros(len(examples)), np.zeros(len(examples))
        outputs: list[Any] = [None] * len(examples)
        feed, size = batches.Batches(self._task.kind, examples), self._batch_size
        own = placing.own_rows(self._mesh, size)
        for window in self._windows(examples):
            self.between()
            batch = placing.put(feed(window, size, None if own is None else own.tolist()), self._mesh, rows=size)
            made = (*self._score(adapter, self._buffers, self._frozen, batch), batch["weights"])
            loss, found, weight = jax.device_get(processes.whole(made, self._mesh))
            for at, row in enumerate(window.rows):
                losses[row], weights[row], outputs[row] = loss[at], weight[at], found[at]
        return losses, weights, outputs

    def _choose(self, adapter: Any) -> list[str]:
        choices, asked = self._choices, self._task.asked
        choice = self._writer.choice
        examples = [example for prompt in asked for text in choices for example in choice(self._reader, prompt, text)]
        if len(examples) != len(asked) * len(choices):
            raise JpeftError("evaluation.answers: choose: a prompt with a completion is longer than data.max_length")
        losses = self._run(adapter, examples)[0].reshape(-1, len(choices))
        return [choices[index] for index in losses.argmin(1)]

    def _generate(self, adapter: Any) -> list[str]:
        model = jpeft.combine(self._graphdef, adapter, self._buffers, self._frozen)
        prompts = [self._writer.prompt_ids(example) for example in self._task.test]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        said = [""] * len(prompts)
        for start in range(0, len(order), self._batch_size):
            self.between()
            rows = order[start : start + self._batch_size]
            padded = rows + rows[:1] * (self._batch_size - len(rows))  # one shape, also for the last batch
            chosen = [prompts[row] for row in padded]
            room = (session.context(model) or math.inf) - max(len(prompt) for prompt in chosen)
            made = generate_texts(model, self._reader, chosen, max(1, int(min(self._answer_tokens, room))))
            for row, text in zip(rows, made, strict=False):
                said[row] = text
        return said
