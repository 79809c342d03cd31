"""The step: weighted by tokens, a pure function of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from train import batches
from train.examples import Example, Tags
from train.optimizers import rates, recipe
from train.schema import TrainingConfig
from train.step import make_scorer, make_step
from train.tasks.task import Task
from train.tasks.text import Text
from train.tasks.token_classification import TokenClassification

LENGTHS = ((5, 3), (40, 30), (12, 1), (9, 0))  # tokens, learnt tokens


def rows() -> list[Example]:
    made = []
    for row, (length, learnt) in enumerate(LENGTHS):
        ids = np.random.default_rng(row).integers(5, 100, size=length).astype(np.int32)
        targets = np.arange(length) >= length - learnt
        tags = np.where(targets, np.arange(length) % 3, -100)
        made.append(Example(ids, targets, row, Tags(tags, np.cumsum(targets) - 1, tags[targets])))
    return made


def adapted(folder: Path, *, dropout: float = 0.0, seed: int = 1, **given: Any) -> Any:
    model = jpeft.models.load(folder, dtype="float32", **given)
    targets = "all-linear"
    model = jpeft.LoRA(rank=2, targets=targets, dropout=dropout)(model, rngs=seed)
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    key = jax.random.key(3)
    # B starts as zero, which would hide most gradients.
    moved = {
        name: array + 0.1 * jax.random.normal(jax.random.fold_in(key, number), array.shape)
        for number, (name, array) in enumerate(adapter.items())
    }
    return model, graphdef, moved, buffers, frozen


def sgd(model: Any) -> Any:
    return optax.with_extra_args_support(optax.sgd(1.0))  # shows the gradient itself


def updater(parts: Any, size: int, accumulation: int, task: type[Task] = Text) -> Callable[..., Any]:
    """The function (key=, number=) -> (adapter after the step, its numbers), compiled once."""
    _, graphdef, adapter, buffers, frozen = parts
    transform = sgd(None)
    step = make_step(graphdef, task, functools.partial(sgd))  # a step of its own: a test changes what is traced
    window = batches.Window((0, 1, 2, 3)[: size * accumulation], 40)
    batch = batches.split(batches.Batches(task, rows())(window, size * accumulation), accumulation)

    def update(*, key: int = 0, number: int = 0) -> Any:
        state = jax.tree.map(jnp.copy, adapter), transform.init(adapter)
        found, _, metrics = step(*state, buffers, frozen, batch, jax.random.key(key), jnp.int32(number), {})
        return found, metrics

    return update


def assert_close(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    for name in one:
        scale = max(1.0, float(jnp.abs(one[name]).max()))
        np.testing.assert_allclose(one[name], other[name], atol=tolerance * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize(("size", "accumulation"), [(1, 2), (2, 2)])
@pytest.mark.parametrize("task", [Text, TokenClassification])
def test_accumulation_weighs_by_tokens(llama: Path, bert: Path, size: int, accumulation: int, task: type[Task]) -> None:
    parts = adapted(llama) if task is Text else adapted(bert, task=task.head, num_labels=3)
    whole, metrics = updater(parts, size * accumulation, 1, task)()
    cut, same = updater(parts, size, accumulation, task)()
    assert_close(whole, cut)
    assert float(metrics["loss"]) == pytest.approx(float(same["loss"]), rel=1e-6)
    assert any(float(jnp.abs(whole[name] - parts[2][name]).max()) > 1e-3 for name in whole)


def test_what_methods_add_to_the_loss_counts_once_in_a_step(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the step is cut; the loss that it reports is the task's."""
    parts = adapted(llama)
    plain, metrics = updater(parts, 2, 2)()

    def penalty(model: Any) -> jax.Array:
        squares = [jnp.sum(value**2) for value in jpeft.partition(model).adapter.values()]
        return 0.5 * jnp.sum(jnp.stack(squares))

    monkeypatch.setattr(jpeft, "penalty", penalty)
    held, same = updater(parts, 2, 2)()
    assert_close(held, {name: value - parts[2][name] for name, value in plain.items()})
    assert float(same["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)


def test_the_loss_is_the_mean_over_learnt_tokens(llama: Path) -> None:
    _, graphdef, adapter, buffers, frozen = adapted(llama)
    score = make_scorer(graphdef, Text)
    batch = batches.Batches(Text, rows())(batches.Window((0, 1, 2, 3), 40), 4)
    losses, _ = score(adapter, buffers, frozen, batch)
    assert batch["weights"].tolist() == [3, 30, 1, 0]
    assert float(losses[3]) == 0.0
    model = jpeft.combine(graphdef, adapter, buffers, frozen)
    for number, row in enumerate(rows()[:3]):
        logits = jax.nn.log_softmax(model(jnp.asarray(row.ids)[None])[0])
        wanted = [-logits[at - 1, row.ids[at]] for at in np.flatnonzero(row.targets)]
        np.testing.assert_allclose(losses[number], sum(wanted), rtol=1e-5)


def test_rows_that_fill_up_a_batch_weigh_nothing(llama: Path) -> None:
    parts = adapted(llama)
    _, graphdef, adapter, buffers, frozen = parts
    score = make_scorer(graphdef, Text)
    full = batches.Batches(Text, rows())(batches.Window((0,), 40), 1)
    filled = batches.Batches(Text, rows())(batches.Window((0,), 40), 4)
    one, other = (score(adapter, buffers, frozen, batch) for batch in (full, filled))
    assert float(jnp.sum(one[0])) == pytest.approx(float(jnp.sum(other[0])), rel=1e-6)
    assert full["weights"].sum() == filled["weights"].sum()


def test_a_batch_without_targets_changes_nothing(llama: Path) -> None:
    parts = adapted(llama)
    _, graphdef, adapter, buffers, frozen = parts
    step = make_step(graphdef, Text, sgd)
    batch = batches.split(batches.Batches(Text, rows())(batches.Window((3,), 40), 2), 1)
    kept = jax.tree.map(jnp.copy, adapter)
    found, _, metrics = step(adapter, optax.sgd(1.0).init(adapter), buffers, frozen, batch, jax.random.key(0), 0, {})
    assert float(metrics["loss"]) == 0.0
    assert_close(kept, found, 0.0)


def test_rates_and_seeds_share_a_program_in_which_each_group_has_its_rate(llama: Path) -> None:
    batch = batches.split(batches.Batches(Text, rows())(batches.Window((0, 1), 40), 2), 1)
    made = []
    for seed, rate in enumerate((1e-2, 3e-2)):
        _, graphdef, adapter, buffers, frozen = adapted(llama, seed=seed)
        labels = {name: name[-1] for name in adapter}
        settings: dict[str, Any] = {"optimizer": "sgd", "clip": None, "groups": {"a": {"learning_rate": 1.0}}}
        training = TrainingConfig(learning_rate=rate, seed=seed, schedule="constant", warmup=0.0, **settings)
        chosen = recipe(training, 10, labels, dict.fromkeys(labels, True))
        step = make_step(graphdef, Text, chosen)
        now = {group: values[0] for group, values in rates(training, 10, labels, np.array([5])).items()}
        state = jax.tree.map(jnp.copy, adapter), chosen.plain().init(adapter)
        found, _, _ = step(*state, buffers, frozen, batch, jax.random.key(seed), jnp.int32(5), now)
        plain = make_step(graphdef, Text, sgd)
        state = jax.tree.map(jnp.copy, adapter), sgd(None).init(adapter)
        whole, _, _ = plain(*state, buffers, frozen, batch, jax.random.key(seed), jnp.int32(5), {})
        for name, value in found.items():
            moved = (whole[name] - adapter[name]) * (1.0 if labels[name] == "a" else rate)
            np.testing.assert_allclose(value - adapter[name], moved, atol=1e-6, err_msg=name)
        made.append(step)
    assert made[0] is made[1]
    assert made[0]._cache_size() == 1


def test_dropout_is_a_function_of_key_and_step(llama: Path) -> None:
    parts = adapted(llama, dropout=0.5)
    update = updater(parts, 2, 1)
    first, _ = update()
    again, _ = update()
    assert_close(first, again, 0.0)
    for other, _ in (update(number=1), update(key=1)):
        assert any(bool(jnp.any(first[name] != other[name])) for name in first)
    # Micro-batches have masks of their own: the same row twice is not the same twice.
    _, graphdef, adapter, buffers, frozen = parts
    score = make_scorer(graphdef, Text)
    batch = batches.Batches(Text, rows())(batches.Window((0, 1), 40), 2)
    one, two = (score(adapter, buffers, frozen, batch)[0] for _ in range(2))
    assert one.tolist() == two.tolist()
