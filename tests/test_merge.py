"""Merging and stripping: precision, refusals, nesting."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jpeft
from jpeft import surgery
from jpeft.wrapper import Wrapper
from tests import zoo


class Doubled(Wrapper):
    """A wrapper that is no function of the weight."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + x.sum()


def with_doubled(model: nnx.Module) -> Any:
    paths = [("layers", "layer", "up"), ("layers", "layer", "down")]
    return surgery.replace(model, {path: lambda base: Doubled(base, name="doubled") for path in paths})


def test_unmergeable_wrappers_are_named_before_anything_happens() -> None:
    model = with_doubled(jpeft.LoRA(rank=2)(zoo.UserModel(nnx.Rngs(0), stacked=True), rngs=0))
    before = {key: value for part in jpeft.partition(model)[1:] for key, value in part.items()}
    message = r"layers/down \(doubled\): Doubled is not a function of the weight.*layers/up \(doubled\)"
    with pytest.raises(jpeft.JpeftError, match=message):
        jpeft.merge(model)
    after = {key: value for part in jpeft.partition(model)[1:] for key, value in part.items()}
    assert all(after[key] is value for key, value in before.items())


def test_a_lora_around_an_unmergeable_wrapper_is_refused_too() -> None:
    model = jpeft.LoRA(rank=2, targets="up")(with_doubled(zoo.UserModel(nnx.Rngs(0), stacked=True)), rngs=0)
    with pytest.raises(jpeft.JpeftError, match="merge: .*Doubled"):
        jpeft.merge(model)


def test_every_non_finite_weight_is_named() -> None:
    parts = jpeft.partition(jpeft.LoRA(rank=2)(zoo.UserModel(nnx.Rngs(0), stacked=True), rngs=0))
    broken = {key: jnp.full_like(value, jnp.nan) for key, value in parts.adapter.items()}
    with pytest.raises(jpeft.JpeftError, match=r"layers/down \(lora\).*not finite.*layers/up \(lora\).*not finite"):
        jpeft.merge(jpeft.combine(parts.graphdef, broken, parts.buffers, parts.frozen))


def test_low_precision_weights_are_rounded_once() -> None:
    base = nnx.Linear(64, 48, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    parts = jpeft.partition(jpeft.LoRA(rank=4, alpha=3)(base, rngs=1))
    values = zoo.trained(parts, size=0.05)
    merged = jpeft.merge(jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen)).kernel[...]
    product = jnp.matmul(values["lora/a"] * 0.75, values["lora/b"], precision="highest")
    exact = base.kernel[...].astype(jnp.float32) + product
    assert merged.dtype == jnp.bfloat16
    # Within half a unit in the last place of the exact sum: one rounding, at the end.
    assert jnp.all(jnp.abs(merged.astype(jnp.float32) - exact) <= jnp.abs(exact) * 2.0**-8)


def test_types_and_values_come_back() -> None:
    base = zoo.UserModel(nnx.Rngs(0), stacked=True)
    adapted = jpeft.LoRA(rank=2)(jpeft.LoRA(rank=2, name="first")(base, rngs=0), rngs=1)
    stripped = jpeft.strip(adapted)
    assert isinstance(stripped.layers.layer.up.kernel, nnx.Param)
    assert stripped.layers.layer.up.kernel.get_value() is base.layers.layer.up.kernel.get_value()
    assert jpeft.applied(stripped) == ()
    assert nnx.graphdef(jpeft.merge(adapted)) == nnx.graphdef(base)


def test_a_new_head_becomes_a_plain_parameter_when_merged() -> None:
    model = zoo.MODELS["bert-mean-classifier"].make("float32")
    model.classifier.kernel = jpeft.Trainable(model.classifier.kernel.get_value(), group="head")
    adapted = jpeft.LoRA(rank=2)(model, rngs=0)
    assert "classifier/kernel" in jpeft.partition(adapted).adapter
    assert type(jpeft.merge(adapted).classifier.kernel) is nnx.Param


class _Shared(nnx.Module):
    """Two layers that read one kernel."""

    def __init__(self) -> None:
        self.first, self.second = (nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(seed)) for seed in range(2))
        self.second.kernel = self.first.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.tanh(self.first(x)))


@pytest.mark.parametrize("targets", ["first", "second", "all-linear"])
def test_a_kernel_that_two_layers_read_is_untied_by_merging(targets: str) -> None:
    if os.environ.get("NNX_GRAPH_MODE") == "false":
        with pytest.raises(ValueError, match="Duplicate"):  # tree mode itself refuses shared Variables
            jpeft.LoRA(rank=2, targets=targets)(_Shared(), rngs=0)
        return
    parts = jpeft.partition(jpeft.LoRA(rank=2, targets=targets)(_Shared(), rngs=0))
    model = jpeft.combine(parts.graphdef, zoo.trained(parts, size=0.5), parts.buffers, parts.frozen)
    x = jax.random.normal(jax.random.key(0), (3, 6))
    assert zoo.relative(jpeft.merge(model)(x), model(x)) < 1e-5


class Scaled(nnx.Linear):
    """A layer that is no plain product."""

    def __call__(self, x: jax.Array, factor: float = 3.0) -> jax.Array:
        return factor * super().__call__(x)


def test_a_layer_that_computes_something_else_is_adapted_but_not_merged() -> None:
    adapted = jpeft.LoRA(rank=2)(Scaled(4, 4, rngs=nnx.Rngs(0)), rngs=0)
    assert adapted(jnp.ones((2, 4)), 2.0).shape == (2, 4)
    with pytest.raises(jpeft.JpeftError, match="Scaled computes something else than the Linear it derives from"):
        jpeft.merge(adapted)


@pytest.mark.parametrize(("axis", "shape"), [((-1, -2), (3, 5, 5)), ((2, 1), (3, 4, 5)), ((-2, -1), (3, 4, 5))])
def test_axes_in_any_order(axis: tuple[int, int], shape: tuple[int, ...]) -> None:
    base = nnx.LinearGeneral(shape[1:], 7, axis=axis, rngs=nnx.Rngs(0))
    parts = jpeft.partition(jpeft.LoRA(rank=2)(base, rngs=0))
    model = jpeft.combine(parts.graphdef, zoo.trained(parts, size=0.5), parts.buffers, parts.frozen)
    x = jax.random.normal(jax.random.key(0), shape)
    assert zoo.relative(jpeft.merge(model)(x), model(x)) < 1e-5
