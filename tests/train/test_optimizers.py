"""Optimizers by name: groups with rates and decay of their own, schedules by optimizer step, state for what trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
import jpeft.models
from train.optimizers import OPTIMIZERS, matrices, rates, recipe, schedule
from train.schema import TrainingConfig

Arrays = dict[str, jax.Array]
STEADY: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "clip": None}


def updater(training: TrainingConfig, labels: dict[str, str], on: dict[str, bool]) -> tuple[Any, dict[str, Any]]:
    """(the optimizer, the rates of the first step)."""
    first = {group: values[0] for group, values in rates(training, 10, labels, np.array([0])).items()}
    return recipe(training, 10, labels, on).plain(), first


@pytest.fixture(scope="module")
def classifier(bert: Path) -> tuple[Any, Arrays, dict[str, str], dict[str, bool]]:
    """(adapted BERT with a new head, its adapter, the group of each array, which are matrices)."""
    base = jpeft.models.load(bert, task="sequence-classification", num_labels=3)
    model = jpeft.LoRA(rank=2, targets=["query"])(base, rngs=nnx.Rngs(0))
    adapter = jpeft.partition(model).adapter
    labels = {name: label for name, label in jpeft.param_labels(model).items() if name in adapter}
    return model, adapter, labels, matrices(model, adapter)


def test_groups_have_their_own_rates_and_decay(classifier: Any) -> None:
    _, adapter, labels, on = classifier
    assert set(labels.values()) == {"head", "lora_a", "lora_b"}
    training = TrainingConfig(
        learning_rate=1e-3,
        head_learning_rate=1e-2,
        groups={"lora_b": {"learning_rate": 1.6e-2}, "head": {"weight_decay": 0.1}},
        **STEADY,
    )
    transform, given = updater(training, labels, on)
    grads = {name: jnp.ones_like(array) for name, array in adapter.items()}
    updates, state = transform.update(grads, transform.init(adapter), adapter, rates=given)
    wanted = {"head": 1e-2, "lora_a": 1e-3, "lora_b": 1.6e-2}
    assert given == pytest.approx(wanted)
    for name, label in labels.items():
        # AdamW's first step has the size of the rate; matrices of the head decay besides, its bias does not.
        decay = wanted[label] * 0.1 * adapter[name] if label == "head" and on[name] else 0.0
        np.testing.assert_allclose(updates[name], -wanted[label] - decay, rtol=1e-3)
    assert {name: on[name] for name in on if "bias" in name} == {name: False for name in on if "bias" in name}
    assert any(on[name] for name, label in labels.items() if label == "head")
    moments = [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "ndim", 0) > 0]
    assert sum(leaf.size for leaf in moments) == 2 * sum(array.size for array in adapter.values())


def test_a_layer_axis_makes_no_matrix_of_a_vector() -> None:
    tiny = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    base = jpeft.models.from_config({**tiny, "num_attention_heads": 2, "num_key_value_heads": 2})
    model = jpeft.IA3()(base, rngs=nnx.Rngs(0))
    assert set(matrices(model, jpeft.partition(model).adapter).values()) == {False}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head_learning_rate": 1.0}, r"head_learning_rate: nothing that trains is a new head; the groups are lora_a"),
        (
            {"groups": {"lora_c": {"learning_rate": 1.0}}},
            r"groups: nothing .* group 'lora_c'; .*lora_a, lora_b .*nearest",
        ),
    ],
)
def test_settings_for_a_group_that_is_not_there(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=said):
        recipe(TrainingConfig(**settings), 10, {"a": "lora_a", "b": "lora_b"}, {})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill_and_decays(name: Any) -> None:
    params = {"w": jnp.ones((2, 8, 4)), "bias": jnp.ones((2, 4))}
    on = {"w": True, "bias": False}
    goal = {"w": jax.random.normal(jax.random.key(0), (2, 8, 4)), "bias": jnp.zeros((2, 4))}

    def distance(arrays: Arrays) -> jax.Array:
        return sum((jnp.sum((arrays[key] - goal[key]) ** 2) for key in goal), jnp.float32(0))

    # An entry of Muon's update is a fifth of the rate in the mean, as Adam's are in the long run of a noisy training.
    training = TrainingConfig(optimizer=name, learning_rate=0.1 if name == "muon" else 0.02, **STEADY)
    transform, given = updater(training, dict.fromkeys(params, "adapter"), on)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        arrays, state = carry
        updates, state = transform.update(jax.grad(distance)(arrays), state, arrays, rates=given)
        return (jax.tree.map(jnp.add, arrays, updates), state), None

    (found, _), _ = jax.lax.scan(step, (params, transform.init(params)), None, length=60)
    assert float(distance(found)) < 0.4 * float(distance(params))

    # Without a gradient a matrix shrinks by rate times decay, a bias stays.
    still = {key: jnp.zeros_like(array) for key, array in params.items()}
    decaying = TrainingConfig(optimizer=name, learning_rate=0.02, weight_decay=0.5, **STEADY)
    transform, given = updater(decaying, dict.fromkeys(params, "adapter"), on)
    updates, _ = transform.update(still, transform.init(params), params, rates=given)
    np.testing.assert_allclose(updates["w"], -0.01, rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], 0.0)


def test_lion_and_muon_by_hand() -> None:
    grad = {"w": jax.random.normal(jax.random.key(1), (3, 6, 2)), "bias": jnp.array([2.0, -3.0])}
    params, labels, on = jax.tree.map(jnp.zeros_like, grad), dict.fromkeys(grad, "adapter"), {"w": True, "bias": False}

    def first(name: Any) -> Any:
        transform, given = updater(TrainingConfig(optimizer=name, learning_rate=0.1, **STEADY), labels, on)
        return transform.update(grad, transform.init(params), params, rates=given)[0]

    np.testing.assert_allclose(first("lion")["w"], -0.1 * jnp.sign(grad["w"]), rtol=1e-6)
    # Muon's updates of a matrix have singular values near one, times 0.2 sqrt(6) to be of Adam's size; layer by layer.
    values = np.linalg.svd(np.asarray(first("muon")["w"]), compute_uv=False) / (0.1 * 0.2 * np.sqrt(6))
    assert values.shape == (3, 2)
    assert np.all((values > 0.6) & (values < 1.3))
    np.testing.assert_allclose(first("muon")["bias"], [-0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_count_optimizer_steps(kind: Any) -> None:
    rate = schedule(TrainingConfig(schedule=kind, warmup=0.2), 20, 1.0)
    values = [float(rate(step)) for step in range(20)]
    np.testing.assert_allclose(values[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    assert values[4] == pytest.approx(1.0)
    if kind == "constant":
        assert values[-1] == pytest.approx(1.0)
    else:
        assert 0 < values[-1] < 0.1
        assert values[4:] == sorted(values[4:], reverse=True)
    assert float(schedule(TrainingConfig(schedule=kind, warmup=0.0), 20, 1.0)(0)) == pytest.approx(1.0)
