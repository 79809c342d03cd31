"""Layers restricted, listed, stacked: the same numbers, and neither copies of the base nor needless backward passes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.stack import runs
from tests import zoo

WIDE, DEPTH = 128, 8


class Wide(nnx.Module):
    """Layers whose weights outweigh their activations."""

    def __init__(self, remat: bool):
        def make(rngs: nnx.Rngs) -> nnx.Module:
            return _WideLayer(rngs)

        self.layers = jpeft.Stack.create(make, DEPTH, rngs=nnx.Rngs(0), remat=remat)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers(x)


class _WideLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDE, WIDE, rngs=rngs)

    def __call__(self, x: jax.Array, index: Any) -> jax.Array:
        return x + nnx.tanh(self.linear(x))


def compiled_gradient(remat: bool, layers: Any) -> Any:
    parts = jpeft.partition(jpeft.LoRA(rank=2, layers=layers)(Wide(remat), rngs=nnx.Rngs(0)))

    def loss(adapter: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jpeft.combine(parts.graphdef, adapter, parts.buffers, frozen)(x) ** 2)

    return jax.jit(jax.grad(loss)).lower(parts.adapter, parts.frozen, jnp.ones((1, WIDE))).compile()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("layers", [range(4, 8), [2, 3], [7], [0, 2, 4, 6]])
def test_the_base_is_never_copied(remat: bool, layers: Any) -> None:
    half_of_base = DEPTH * WIDE * WIDE * 4 / 2
    assert compiled_gradient(remat, layers).memory_analysis().temp_size_in_bytes < half_of_base


@pytest.mark.parametrize("remat", [False, True])
def test_no_backward_pass_below_the_first_adapted_layer(remat: bool) -> None:
    # The cost analysis counts a scan's body once: upper layers adapted are two forward bodies and one backward body,
    # lower layers adapted need a second backward body to reach them.
    upper, lower = (compiled_gradient(remat, layers).cost_analysis()["flops"] for layers in (range(4, 8), range(4)))
    assert lower > 1.2 * upper


def test_runs() -> None:
    assert runs(5, [{0, 1, 2, 3, 4}]) == [(0, 5)]
    assert runs(5, [{2, 3}]) == [(0, 2), (2, 4), (4, 5)]
    assert runs(5, [{0, 1, 2}, {2, 3, 4}]) == [(0, 2), (2, 3), (3, 5)]
    assert runs(3, [set()]) == [(0, 3)]


def value_and_gradient(model: nnx.Module, values: dict[str, jax.Array] | None, key: jax.Array | None = None) -> Any:
    parts = jpeft.partition(model)
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, zoo.VOCABULARY)

    def loss(adapter: Any) -> jax.Array:
        y = jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen, dropout=key)(ids)
        return jnp.mean((y - jax.random.normal(jax.random.key(3), y.shape)) ** 2)

    adapter = parts.adapter if values is None else values
    return adapter, *jax.jit(jax.value_and_grad(loss))(adapter)


def rows(stacked: dict[str, jax.Array], layers: Any, keys: Any) -> dict[str, jax.Array]:
    """A stacked adapter in the keys of a listed one."""
    found = {}
    for key in keys:
        _, layer, rest = key.split("/", 2)
        found[key] = stacked[f"layers/{rest}"][list(layers).index(int(layer))]
    return found


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("layers", [None, range(3, 6), [1, 2], [5], [0, 2, 4]], ids=str)
def test_stacked_equals_listed(layers: Any, remat: bool) -> None:
    method = jpeft.LoRA(rank=3, targets=["up", "down"], layers=layers, dropout=0.3)
    stacked = method(zoo.UserModel(nnx.Rngs(0), stacked=True, remat=remat, depth=6), rngs=nnx.Rngs(4))
    listed = method(zoo.UserModel(nnx.Rngs(0), stacked=False, depth=6), rngs=nnx.Rngs(4))
    covered = stacked.layers.layer.up.layers or range(6)
    start, own = jpeft.partition(stacked).adapter, jpeft.partition(listed).adapter
    assert all(jnp.array_equal(own[key], value) for key, value in rows(start, covered, own).items())

    values = zoo.trained(jpeft.partition(stacked))
    key = jax.random.key(8)
    _, loss, gradient = value_and_gradient(stacked, values, key)
    _, expected, listed_gradient = value_and_gradient(listed, rows(values, covered, own), key)
    assert np.allclose(loss, expected, rtol=1e-6)
    turned = rows(gradient, covered, own)
    assert max(zoo.relative(turned[name], listed_gradient[name]) for name in own) < 1e-4


def test_layers_scattered_over_many_runs_share_one_hull() -> None:
    base = zoo.UserModel(nnx.Rngs(0), stacked=True, depth=8)
    parts = jpeft.partition(jpeft.LoRA(rank=2, targets="up", layers=[1, 3, 5])(base, rngs=nnx.Rngs(0)))
    assert parts.adapter["layers/up/lora/a"].shape[0] == 5
    assert (parts.buffers["layers/up/lora/scale"][:, 0] > 0).tolist() == [True, False, True, False, True]
    _, _, gradient = value_and_gradient(jpeft.combine(*parts), zoo.trained(parts))
    assert not jnp.any(gradient["layers/up/lora/a"][1])
    assert jnp.any(gradient["layers/up/lora/a"][2])


def test_two_methods_with_different_layers() -> None:
    base = zoo.UserModel(nnx.Rngs(0), stacked=True, depth=6)
    both = jpeft.compose(
        jpeft.LoRA(rank=2, targets="up", layers=range(4)),
        jpeft.LoRA(rank=2, targets=["up", "down"], layers=range(2, 6), name="b"),
    )(base, rngs=nnx.Rngs(0))
    parts = jpeft.partition(both)
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    ids = jnp.arange(6)[None]
    assert zoo.relative(jpeft.merge(model)(ids), model(ids)) < 1e-5
    one_by_one = nnx.clone(model)
    one_by_one.layers = one_by_one.layers.unstack()
    assert zoo.relative(one_by_one(ids), model(ids)) < 1e-6


def test_from_layers_and_back() -> None:
    stack = zoo.UserModel(nnx.Rngs(0), stacked=True).layers
    again = jpeft.Stack.from_layers(list(stack.unstack()))
    x = jnp.ones((1, 2, zoo.WIDTH))
    assert jnp.array_equal(stack(x), again(x))
    with pytest.raises(jpeft.JpeftError, match="differ in structure"):
        jpeft.Stack.from_layers([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(0))])


def test_compiled_program_does_not_grow_with_depth() -> None:
    def size(depth: int) -> int:
        model = jpeft.LoRA(rank=2)(zoo.UserModel(nnx.Rngs(0), stacked=True, depth=depth), rngs=nnx.Rngs(0))
        parts = jpeft.partition(model)
        ids = jnp.ones((1, 4), jnp.int32)
        lowered = jax.jit(lambda *arrays: jpeft.combine(parts.graphdef, *arrays)(ids)).lower(*parts[1:])
        return lowered.as_text().count("\n")

    assert size(4) == size(16)


def test_a_stack_inside_a_stack_is_refused() -> None:
    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.inner = jpeft.Stack.create(zoo.Block, 2, rngs=rngs)

    class Nested(nnx.Module):
        def __init__(self) -> None:
            self.outer = jpeft.Stack.create(Outer, 2, rngs=nnx.Rngs(0))

    with pytest.raises(jpeft.JpeftError, match="outer/inner is a Stack inside the layers of a Stack"):
        jpeft.LoRA(rank=2)(Nested(), rngs=0)


@pytest.mark.parametrize("layers", [None, [1, 2]], ids=str)
def test_layer_inputs_in_the_memory_of_the_host_change_no_gradient(layers: Any) -> None:
    method = jpeft.LoRA(rank=3, targets=["up", "down"], layers=layers)
    model = method(zoo.UserModel(nnx.Rngs(0), stacked=True, depth=4), rngs=nnx.Rngs(4))
    there = jpeft.offload(model)
    assert model.layers.remat is False
    values, key = zoo.trained(jpeft.partition(model)), jax.random.key(8)
    for one, other in zip(*(jax.tree.leaves(value_and_gradient(m, values, key)) for m in (model, there)), strict=True):
        assert zoo.relative(one, other) < 1e-5

    parts, ids = jpeft.partition(there), zoo.ids()
    run = jax.grad(lambda adapter: jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)(ids).sum())
    shape = ",".join(map(str, (4 if layers is None else 2, *ids.shape, zoo.WIDTH)))  # of the inputs of adapted layers
    program = str(jax.make_jaxpr(run)(values))
    assert f"f32<host>[{shape}]" in program
    assert f"f32[{shape}]" not in program
    with pytest.raises(jpeft.JpeftError, match=r"offload: UserModel keeps its layers in no jpeft\.Stack"):
        jpeft.offload(zoo.UserModel(nnx.Rngs(0), stacked=False))


def test_one_layer_as_a_module() -> None:
    parts = jpeft.partition(jpeft.LoRA(rank=2, layers=[1])(Wide(False), rngs=0))
    stack = jpeft.combine(parts.graphdef, zoo.trained(parts), *parts[2:]).layers
    x = jnp.linspace(-1, 1, WIDE)[None]
    with_adapter, without = stack.at(1), stack.at(0)
    assert "lora" not in str(nnx.graphdef(without))
    y = stack(x)
    for index in range(DEPTH):
        x = stack.at(index)(x, index)
    assert np.allclose(x, y, rtol=1e-5, atol=1e-6)
    merged = jpeft.merge(with_adapter)
    assert np.allclose(merged(x, 1), with_adapter(x, 1), rtol=1e-5, atol=1e-5)
    for index in (-1, DEPTH):
        with pytest.raises(jpeft.JpeftError, match=f"at: layer {index} of {DEPTH}"):
            stack.at(index)
