"""The four-way partition and what users do with it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jpeft
from tests import zoo


class Statistic(nnx.Variable):
    """A Variable type of the user's own."""


class WithState(nnx.Module):
    """Parameters, a user's own Variable, batch statistics, a raw array, dropout and a LoRA of Flax."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.flax_lora = nnx.LoRA(4, 2, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.count = Statistic(jnp.array(3))
        self.table = jnp.arange(4.0)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.norm(self.linear(x) + self.flax_lora(x)) + self.table)


@pytest.fixture
def adapted() -> Any:
    return jpeft.LoRA(rank=2, targets="linear", dropout=0.2)(WithState(nnx.Rngs(0)), rngs=nnx.Rngs(0))


def test_every_array_is_in_one_part(adapted: Any) -> None:
    parts = jpeft.partition(adapted)
    assert parts.adapter.keys() == {"linear/lora/a", "linear/lora/b"}
    assert parts.buffers.keys() == {"linear/lora/scale"}
    assert {"linear/kernel", "linear/bias", "flax_lora/lora_a", "norm/mean", "count", "table"} <= parts.frozen.keys()
    assert all("base" not in key for part in parts[1:] for key in part)
    assert hash(parts.graphdef) == hash(jpeft.partition(adapted).graphdef)


def test_what_comes_back_is_the_model(adapted: Any) -> None:
    again = jpeft.combine(*jpeft.partition(adapted))
    assert jpeft.partition(again).graphdef == jpeft.partition(jpeft.combine(*jpeft.partition(again))).graphdef
    assert isinstance(again.count, Statistic)
    assert isinstance(jpeft.strip(again).flax_lora.lora_a, nnx.LoRAParam)


def test_plain_arrays_survive_tree_functions(adapted: Any) -> None:
    parts = jpeft.partition(adapted)
    doubled = jax.tree.map(lambda a: a * 2, parts.adapter)
    halved = jax.tree.map(lambda a: a.astype(jnp.bfloat16), parts.adapter)
    jpeft.combine(parts.graphdef, doubled, parts.buffers, parts.frozen)(jnp.ones((1, 4)))
    jpeft.combine(parts.graphdef, halved, parts.buffers, parts.frozen)(jnp.ones((1, 4)))
    shapes = jax.eval_shape(lambda *arrays: jpeft.combine(parts.graphdef, *arrays)(jnp.ones((1, 4))), *parts[1:])
    assert shapes.shape == (1, 4)
    assert "linear/lora/a" in repr(parts.adapter)


def test_keys_that_do_not_fit_are_named(adapted: Any) -> None:
    graphdef, adapter, buffers, frozen = jpeft.partition(adapted)
    less = {k: v for k, v in adapter.items() if k != "linear/lora/b"}
    with pytest.raises(jpeft.JpeftError, match="missing 'linear/lora/b'"):
        jpeft.combine(graphdef, less, buffers, frozen)
    with pytest.raises(jpeft.JpeftError, match=r"unknown 'linear/lora/c' \(nearest: \['linear/lora/"):
        jpeft.combine(graphdef, {**adapter, "linear/lora/c": 1}, buffers, frozen)
    with pytest.raises(jpeft.JpeftError, match="'linear/lora/a' given twice"):
        jpeft.combine(graphdef, adapter, {**buffers, "linear/lora/a": 1}, frozen)


def test_dropout_switches_the_whole_model(adapted: Any) -> None:
    parts = jpeft.partition(adapted)
    x = jnp.ones((64, 4))
    quiet = jpeft.combine(*parts)
    assert jnp.array_equal(quiet(x), jpeft.combine(*parts)(x))
    noisy = jpeft.combine(*parts, dropout=jax.random.key(0))
    dropped = float(jnp.mean(noisy(x) == 0))
    assert 0.3 < dropped < 0.7
    # Flax's own dropout counts its calls, so a model is asked once.
    once, again = (jpeft.combine(*parts, dropout=jax.random.key(0))(x) for _ in range(2))
    assert jnp.array_equal(once, again)


def test_masks_differ_between_layers_adapters_and_steps() -> None:
    base = zoo.UserModel(nnx.Rngs(0), stacked=True)
    two = jpeft.compose(jpeft.LoRA(rank=2, dropout=0.5), jpeft.LoRA(rank=2, dropout=0.5, name="second"))
    parts = jpeft.partition(two(base, rngs=nnx.Rngs(0)))

    def keys(step: int) -> list[bytes]:
        model = jpeft.combine(*parts, dropout=jax.random.fold_in(jax.random.key(0), step))
        outer = model.layers.layer.up
        found = [outer.dropout.key[...], outer.base.dropout.key[...], model.layers.layer.down.dropout.key[...]]
        return [row.tobytes() for key in found for row in jax.random.key_data(key)]

    assert len({*keys(1), *keys(2)}) == 2 * 3 * 3


def test_the_plain_nnx_optimizer_trains_the_adapter_only(adapted: Any) -> None:
    before = {k: v.copy() for k, v in jpeft.partition(adapted).frozen.items() if k.startswith("linear")}
    optimizer = nnx.Optimizer(adapted, optax.sgd(0.1), wrt=nnx.Param)
    graphdef, params, rest = nnx.split(adapted, nnx.Param, ...)

    def loss(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params, jax.tree.map(lambda a: a, rest))  # Flax's dropout counts in its own copy
        return jnp.sum(model(jnp.ones((2, 4))) ** 2)

    grads = jax.grad(loss)(params)
    optimizer.update(adapted, grads)
    after = jpeft.partition(adapted)
    assert jnp.any(after.adapter["linear/lora/b"] != 0)
    assert all(jnp.array_equal(after.frozen[key], value) for key, value in before.items())


def test_donating_the_adapter_leaves_combine_usable() -> None:
    parts = jpeft.partition(jpeft.LoRA(rank=2)(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))
    step = jax.jit(lambda adapter: jax.tree.map(lambda a: a + 1, adapter), donate_argnums=0)
    adapter = step(step(parts.adapter))
    assert jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)(jnp.ones((1, 4))).shape == (1, 4)


def test_optimizer_state_exists_for_what_trains(adapted: Any) -> None:
    parts = jpeft.partition(adapted)
    tree = {**parts.frozen, **parts.buffers, **parts.adapter}
    state = optax.masked(optax.adam(1e-3), jpeft.trainable_mask(adapted)).init(tree)
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(sizes) == 2 * sum(value.size for value in parts.adapter.values())


def test_two_variables_of_one_canonical_key_are_refused() -> None:
    class Clash(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    model = jpeft.LoRA(rank=2, name="extra")(Clash(), rngs=nnx.Rngs(0))
    model.linear.base.extra = nnx.Dict(a=nnx.Param(jnp.ones(2)))
    with pytest.raises(jpeft.JpeftError, match="canonical key 'linear/extra/a'"):
        jpeft.partition(model)


def test_describe() -> None:
    table = jpeft.describe(jpeft.LoRA(rank=2)(zoo.UserModel(nnx.Rngs(0), stacked=True), rngs=nnx.Rngs(0)))
    assert [row.path for row in table.rows][:2] == ["embed/embedding", "layers/down/kernel"]
    expected = 3 * 2 * (2 * zoo.WIDTH + 2 * 20)
    assert table.trainable == expected
    assert f"trainable {expected:,} of {table.total:,} parameters" in str(table)
    assert table.total_bytes == 4 * table.total


def test_a_users_own_scan_over_modules() -> None:
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + nnx.relu(self.linear(x))

    class Scanned(nnx.Module):
        def __init__(self) -> None:
            keys = jax.random.split(jax.random.key(0), 3)
            self.layers = nnx.vmap(lambda key: Layer(nnx.Rngs(key)))(keys)

        def __call__(self, x: jax.Array) -> jax.Array:
            graphdef, state = nnx.split(self.layers)
            return jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)[0]

    parts = jpeft.partition(jpeft.LoRA(rank=2, dropout=0.5)(Scanned(), rngs=nnx.Rngs(0)))
    assert parts.adapter["layers/linear/lora/a"].shape == (3, 4, 2)
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    x = jnp.ones((2, 4))
    assert zoo.relative(jpeft.merge(model)(x), model(x)) < 1e-5
    assert jpeft.combine(*parts, dropout=jax.random.key(1))(x).shape == x.shape


def test_training_mode_of_nnx_needs_no_key() -> None:
    model = jpeft.LoRA(rank=2, dropout=0.5)(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=0)
    parts = jpeft.partition(model)
    trained = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    expected = trained(jnp.ones((2, 4)))
    trained.train()
    assert jnp.array_equal(trained(jnp.ones((2, 4))), expected)


def test_attributes_of_the_users_model_are_its_own() -> None:
    class Named(nnx.Module):
        def __init__(self) -> None:
            self.q, self.k = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
            self.heads, self.peft_methods, self.base_prefix = ("q", "k"), "mine", None

    model = jpeft.LoRA(rank=2)(Named(), rngs=0)
    assert len(jpeft.partition(model).adapter) == 4
    assert model.peft_methods == jpeft.strip(model).peft_methods == "mine"
