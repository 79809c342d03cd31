"""LoRA: its configuration, its arithmetic, ranks per layer, initial values."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jpeft
from jpeft.methods import from_dict
from tests import zoo


@pytest.fixture(scope="module")
def stacked() -> Any:
    return zoo.UserModel(nnx.Rngs(0), stacked=True, depth=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 0}, "rank=0 is not a whole number of at least 1"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"rank": True}, "rank=True"),
        ({"alpha": math.nan}, "alpha=nan is not a finite number"),
        ({"alpha": "16"}, "alpha='16'"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"init": "zeros"}, "init='zeros'; choose 'kaiming', 'gaussian'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"name": "a b"}, "name='a b' is not an identifier"),
        ({"layers": [-1]}, r"layers=\[-1\]"),
        ({"layers": [1, 1]}, "distinct layer numbers"),
        ({"layers": "all"}, "layers='all'"),
        ({"rank_pattern": {"up": 1.5}}, r"rank_pattern\['up'\]=1.5"),
        ({"alpha_pattern": {"up": math.inf}}, r"alpha_pattern\['up'\]=inf is not a finite number"),
        ({"alpha": 10**400}, "alpha=a number of very many digits is not a finite number"),
        ({"alpha": 1e39}, r"alpha=1e\+39 is not a finite number"),
        ({"rank": 10**12}, "rank is 1000000000000, more than the 65,536 that there can be"),
        ({"use_rslora": "false"}, "use_rslora='false'; choose True or False"),
        ({"targets": 3}, "LoRA: 3 is no target"),
        ({"targets": {"up": 4}}, "is no target"),
        ({"rank_pattern": ["up"]}, "is no mapping"),
        ({"rank_pattern": {1: 4}}, "is no mapping"),
        ({"alpha_pattern": {"up": None}}, r"alpha_pattern\['up'\]=None is not a finite number"),
        ({"name": "_base"}, "name='_base'"),
    ],
)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=message):
        jpeft.LoRA(**config)


def test_a_ratio_that_would_not_train_b() -> None:
    for ratio in (0, -1):
        with pytest.raises(jpeft.JpeftError, match=f"LoRAPlus: ratio={ratio} is not above 0"):
            jpeft.LoRAPlus(ratio=ratio)


def test_configuration_survives_json() -> None:
    method = jpeft.LoRA(
        rank=4,
        alpha=2.5,
        layers=range(2, 4),
        targets=["up", "down"],
        exclude="down",
        rank_pattern={"up": 3},
        dropout=0.1,
    )
    assert from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert hash(from_dict(method.to_dict())) == hash(method)
    with pytest.raises(jpeft.JpeftError, match=r"unknown fields 'lora_alpha' \(nearest: alpha"):
        from_dict({"method": "lora", "lora_alpha": 3})
    with pytest.raises(jpeft.JpeftError, match="unknown method 'lorra'; nearest: lora"):
        from_dict({"method": "lorra"})


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3 / 4), (True, 3 / 2)])
def test_the_update_is_scaled_product(rslora: bool, scale: float) -> None:
    base = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    adapted = jpeft.LoRA(rank=4, alpha=3, use_rslora=rslora)(base, rngs=nnx.Rngs(1))
    parts = jpeft.partition(adapted)
    values = zoo.trained(parts)
    x = jax.random.normal(jax.random.key(0), (3, 2, 5))
    expected = base(x) + scale * (x @ values["lora/a"]) @ values["lora/b"]
    assert zoo.relative(jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen)(x), expected) < 1e-6


def test_the_backward_pass_is_that_of_the_formula() -> None:
    base = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    parts = jpeft.partition(jpeft.LoRA(rank=4, alpha=3)(base, rngs=nnx.Rngs(1)))
    x = jax.random.normal(jax.random.key(0), (3, 2, 5))
    weights = jax.random.normal(jax.random.key(1), (3, 2, 7))
    values = {**zoo.trained(parts), **parts.buffers}

    def ours(values: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(weights * jnp.sin(jpeft.combine(parts.graphdef, values, {}, parts.frozen)(x)))

    def plain(values: Any, x: jax.Array) -> jax.Array:
        update = ((x @ values["lora/a"]) * values["lora/scale"]) @ values["lora/b"]
        return jnp.sum(weights * jnp.sin(base(x) + update))

    for got, want in zip(*(jax.tree.leaves(jax.grad(f, (0, 1))(values, x)) for f in (ours, plain)), strict=True):
        assert zoo.relative(got, want) < 1e-5
    second = [jax.grad(lambda x, f=f: jnp.sum(jax.grad(f, 1)(values, x) ** 2))(x) for f in (ours, plain)]
    assert zoo.relative(second[0], second[1]) < 1e-5


def test_a_trainable_base_still_gets_its_gradient() -> None:
    adapted = jpeft.LoRA(rank=2)(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    parts = jpeft.partition(adapted)
    x = jnp.ones((3, 5))

    def loss(frozen: Any) -> jax.Array:
        return jnp.sum(jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, frozen)(x))

    assert jnp.allclose(jax.grad(loss)(parts.frozen)["kernel"], 3.0)


RANKS = {"layers.0": 4, "layers.1": 1, "layers.2.up": 0, "layers.2.down": 3}
ALPHAS = {"layers.0.up": 5.0}


def test_ranks_per_layer_equal_ragged_adapters(stacked: Any) -> None:
    method = jpeft.LoRA(rank=2, alpha=3, rank_pattern=RANKS, alpha_pattern=ALPHAS, targets=["up", "down"])
    parts = jpeft.partition(method(stacked, rngs=nnx.Rngs(3)))
    values = zoo.trained(parts)
    model = jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen)

    by_hand = jpeft.strip(model)
    for name, ranks in {"up": [4, 1, 0, 2], "down": [4, 1, 3, 2]}.items():
        kernel = getattr(by_hand.layers.layer, name).kernel
        rows = []
        a, b = iter(values[f"layers/{name}/lora/a"]), iter(values[f"layers/{name}/lora/b"])
        for layer, rank in enumerate(ranks):
            alpha = 5.0 if (layer, name) == (0, "up") else 3.0
            delta = next(a)[:, :rank] @ next(b)[:rank] * (alpha / rank) if rank else 0.0  # rank 0 has no row
            rows.append(kernel[layer] + delta)
        kernel.set_value(jnp.stack(rows))
    ids = jnp.arange(8)[None]
    assert zoo.relative(model(ids), by_hand(ids)) < 1e-5
    assert zoo.relative(jpeft.merge(model)(ids), by_hand(ids)) < 1e-5

    gradient = jax.grad(lambda v: jnp.sum(jpeft.combine(parts.graphdef, v, parts.buffers, parts.frozen)(ids) ** 2))(
        values
    )
    assert not jnp.any(gradient["layers/up/lora/a"][1, :, 1:])
    assert not jnp.any(gradient["layers/up/lora/b"][1, 1:])


def test_initial_values_depend_on_seed_path_and_layer_alone(stacked: Any) -> None:
    def start(model: Any, seed: int = 0, **config: Any) -> dict[str, jax.Array]:
        return jpeft.partition(jpeft.LoRA(rank=2, **config)(model, rngs=nnx.Rngs(seed))).adapter

    both, turned = start(stacked, targets=["up", "down"]), start(stacked, targets=["down", "up"])
    assert all(jnp.array_equal(both[key], turned[key]) for key in both)
    assert jnp.array_equal(start(stacked, targets="up")["layers/up/lora/a"], both["layers/up/lora/a"])
    some = start(stacked, targets="up", layers=[2, 3])
    assert jnp.array_equal(some["layers/up/lora/a"], both["layers/up/lora/a"][2:])
    listed = start(zoo.UserModel(nnx.Rngs(0), stacked=False, depth=4), targets="up")
    assert jnp.array_equal(listed["layers/3/up/lora/a"], both["layers/up/lora/a"][3])
    assert not jnp.array_equal(start(stacked, 1, targets="up")["layers/up/lora/a"], both["layers/up/lora/a"])
    kaiming = both["layers/up/lora/a"]
    assert len(np.unique(kaiming)) == kaiming.size
    assert not jnp.any(both["layers/up/lora/b"])


def test_distribution_of_initial_values() -> None:
    base = nnx.Linear(400, 300, rngs=nnx.Rngs(0))
    uniform = jpeft.LoRA(rank=16)(base, rngs=nnx.Rngs(0)).a[...]
    assert abs(float(uniform.max()) * 20 - 1) < 0.01
    assert abs(float(uniform.std()) * 20 - 1 / math.sqrt(3)) < 0.02
    normal = jpeft.LoRA(rank=16, init="gaussian")(base, rngs=nnx.Rngs(0)).a[...]
    assert abs(float(normal.std()) * 16 - 1) < 0.05
    table = jpeft.LoRA(rank=64, targets=lambda name, module: True)(
        nnx.Embed(50, 300, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
    )
    assert not jnp.any(table.a[...])
    assert abs(float(table.b[...].std()) - 1) < 0.02


def test_an_adapted_embedding_serves_look_up_and_tied_head() -> None:
    base = nnx.Embed(11, 6, rngs=nnx.Rngs(0))
    parts = jpeft.partition(jpeft.LoRA(rank=2, targets=lambda name, module: True)(base, rngs=nnx.Rngs(0)))
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    merged = jpeft.merge(model)
    query = jax.random.normal(jax.random.key(0), (3, 6))
    assert zoo.relative(model(jnp.arange(11)), merged(jnp.arange(11))) < 1e-6
    assert zoo.relative(model.attend(query), merged.attend(query)) < 1e-5


def test_layers_that_cannot_be_adapted_say_so() -> None:
    batched = nnx.LinearGeneral(4, 5, batch_axis={0: 2}, rngs=nnx.Rngs(0))
    masked = nnx.Conv(4, 4, (3,), mask=jnp.ones((3, 4, 4)), rngs=nnx.Rngs(0))
    with pytest.raises(jpeft.JpeftError, match="a convolution with a mask"):
        jpeft.LoRA(rank=2, targets=nnx.Conv)(masked, rngs=nnx.Rngs(0))
    overridden = jpeft.LoRA(rank=2)(nnx.Einsum("ab,bc->ac", (4, 5), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(jpeft.JpeftError, match="is called as"):
        overridden(jnp.ones((2, 4)), "ab,bc->ca")
    with pytest.raises(jpeft.JpeftError, match="'inner/up'"):
        jpeft.LoRA(rank=2)(
            nnx.Dict(inner=nnx.Dict(up=nnx.LinearGeneral(4, 5, batch_axis={0: 2}, rngs=nnx.Rngs(0)))), rngs=0
        )
    with pytest.raises(jpeft.JpeftError, match="batch_axis"):
        jpeft.LoRA(rank=2)(batched, rngs=nnx.Rngs(0))
    grouped = nnx.Conv(6, 6, (3,), feature_group_count=3, rngs=nnx.Rngs(0))
    with pytest.raises(jpeft.JpeftError, match="rank=2 is no multiple of .*feature_group_count=3"):
        jpeft.LoRA(rank=2, targets=lambda name, module: True)(grouped, rngs=nnx.Rngs(0))
    with pytest.raises(jpeft.JpeftError, match="adapts an nnx.Module, not a dict"):
        jpeft.LoRA()({}, rngs=nnx.Rngs(0))
    with pytest.raises(jpeft.JpeftError, match="give nnx.Rngs"):
        jpeft.LoRA()(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rngs="seed")


def test_learning_rate_groups(stacked: Any) -> None:
    labels = jpeft.param_labels(jpeft.LoRA(rank=2, targets="up")(stacked, rngs=nnx.Rngs(0)))
    assert labels["layers/up/lora/a"] == "lora_a"
    assert labels["layers/up/lora/b"] == "lora_b"
    assert set(labels.values()) == {"lora_a", "lora_b", "frozen"}


def test_the_sum_of_two_adapters_merges_to_the_sum(stacked: Any) -> None:
    two = jpeft.compose(jpeft.LoRA(rank=2), jpeft.LoRA(rank=3, name="second"))(stacked, rngs=nnx.Rngs(0))
    parts = jpeft.partition(two)
    values = zoo.trained(parts)
    kernel = jpeft.strip(two).layers.layer.up.kernel[...]
    by_hand = kernel + sum(values[f"layers/up/{n}/a"] @ values[f"layers/up/{n}/b"] for n in ("lora", "second"))
    merged = jpeft.merge(jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen))
    assert zoo.relative(merged.layers.layer.up.kernel[...], by_hand) < 1e-6


def test_numbers_of_numpy_are_numbers() -> None:
    plain = jpeft.LoRA(rank=4, alpha=2.0, layers=[1, 2], rank_pattern={"up": 3})
    numpy = jpeft.LoRA(
        rank=np.int64(4), alpha=np.float32(2), layers=(np.int32(i) for i in (1, 2)), rank_pattern={"up": np.int8(3)}
    )
    assert plain == numpy
    assert json.dumps(numpy.to_dict()) == json.dumps(plain.to_dict())


def test_every_target_of_rank_zero_is_refused(stacked: Any) -> None:
    with pytest.raises(jpeft.JpeftError, match="gives every target rank 0"):
        jpeft.LoRA(targets="up", rank_pattern={"up": 0})(stacked, rngs=0)


def test_an_embedding_of_one_row() -> None:
    base = nnx.Embed(1, 4, rngs=nnx.Rngs(0))
    adapted = jpeft.LoRA(rank=2, targets=nnx.Embed)(base, rngs=0)
    assert jnp.array_equal(adapted(jnp.array([0, 5])), base(jnp.array([0, 5])))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_meshes_of_every_kind(kind: Any, tmp_path: Any) -> None:
    """Data parallel over 8 devices: jit over automatic and explicit axes, and shard_map, as on one device."""
    base = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    parts = jpeft.partition(jpeft.LoRA(rank=2)(base, rngs=0))
    adapter, x = zoo.trained(parts), jax.random.normal(jax.random.key(0), (8, 3, 8))

    def loss(adapter: Any, frozen: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jpeft.combine(parts.graphdef, adapter, parts.buffers, frozen)(x) ** 2)

    expected = jax.grad(loss)(adapter, parts.frozen, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, PartitionSpec())
        a, frozen = jax.device_put((adapter, parts.frozen), whole)
        rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(jax.grad(loss))(a, frozen, rows)
        assert max(zoo.relative(found[k], expected[k]) for k in expected) < 1e-5
        saved = jpeft.combine(parts.graphdef, a, jax.device_put(parts.buffers, whole), frozen)
        jpeft.save_adapter(tmp_path / "a", saved)

        def local(adapter: Any, frozen: Any, x: jax.Array) -> Any:
            return jax.lax.pmean(jax.grad(loss)(jax.lax.pcast(adapter, "data", to="varying"), frozen, x), "data")

        mapped = jax.shard_map(
            local, in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec()
        )
        found = jax.jit(mapped)(a, frozen, rows)
        assert max(zoo.relative(found[k], expected[k]) for k in expected) < 1e-5
