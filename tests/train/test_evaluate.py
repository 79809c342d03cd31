"""Scores: what is behind the numbers of a run, whatever the batches and the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

import jpeft
from tests.train.conftest import make_tokenizer
from train import batches, session
from train import data as task_data
from train.data import TaskData
from train.evaluate import Evaluator, Score
from train.examples import Reader
from train.schema import DataConfig, EvaluationConfig
from train.tasks import task_of


@pytest.fixture
def task(jsonl: Callable[..., Path]) -> TaskData:
    """Prompts and completions whose numbers of learnt tokens differ."""
    colours = ["red", "blue green", "one two three four"]
    rows = jsonl([{"text": f"what is {'the ' * (n % 3)}one ?", "answer": f" {colours[n % 3]}"} for n in range(16)])
    data = DataConfig(source=str(rows), prompt="text", completion="answer", test_size=7)
    _, train, test = task_data.read(data)
    return task_data.prepare(task_of(data), train, test, make_tokenizer(), 64, types=False)


def score(model: Any, task: TaskData, batch_size: int = 4, **evaluation: Any) -> Score:
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    buckets = batches.edges([len(example) for example in task.test])
    settings = EvaluationConfig(**evaluation)
    reader = Reader(make_tokenizer(), 64)
    return Evaluator((graphdef, buffers, frozen), task, reader, settings, buckets, batch_size)(adapter)


def test_losses_are_weighted_by_tokens_and_nothing_is_dropped(llama: Path, task: TaskData) -> None:
    model = jpeft.models.load(llama, dtype="float32")
    first = score(model, task, answers="none")
    for size in (1, 3, 7):
        assert score(model, task, size, answers="none").metrics["loss"] == pytest.approx(
            first.metrics["loss"], rel=1e-6
        )
    # Started away from zero, so that its dropout would be seen.
    dropping, plain = (jpeft.LoRA(rank=2, init="pissa", dropout=rate)(model, rngs=0) for rate in (0.9, 0.0))
    assert score(dropping, task, answers="none") == score(plain, task, answers="none")


def test_virtual_tokens_without_effect_change_no_score(llama: Path, task: TaskData) -> None:
    """In a model whose attention adds nothing, every other token is without effect, and so are virtual ones."""
    model = jpeft.models.load(llama, dtype="float32")
    for path, module in nnx.iter_graph(model):
        if path and path[-1] == "o_proj":
            module.kernel[...] = jnp.zeros_like(module.kernel[...])
    bare = score(model, task)
    assert set(bare.metrics) == {"exact_match", "perplexity", "loss"}
    for method in (
        jpeft.PromptTuning(num_virtual_tokens=3),
        jpeft.PrefixTuning(num_virtual_tokens=3, reparameterize=False),
    ):
        found = score(method(model, rngs=0), task)
        assert found.answers == bare.answers
        assert found.metrics == pytest.approx(bare.metrics, rel=1e-5)
    # What is written follows the last token, a virtual one if they stand behind the text.
    behind = score(jpeft.PromptTuning(num_virtual_tokens=2, position="back")(model, rngs=0), task, answers="none")
    assert behind.metrics["loss"] == pytest.approx(bare.metrics["loss"], rel=1e-5)


def test_texts_leave_room_for_virtual_tokens(llama: Path) -> None:
    model = jpeft.models.load(llama)
    assert session.context(model) == 128
    for method in (jpeft.PromptTuning(num_virtual_tokens=8), jpeft.PrefixTuning(num_virtual_tokens=8)):
        assert session.context(method(model, rngs=0)) == 120
