"""Meshes, rules and what follows from them, on abstract models: nothing is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.sharding import batch_sharding
from jpeft.variables import DropoutKey
from tests import zoo
from tests.sharding.test_methods import CONFIGS


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jpeft.make_mesh(data=-1, fsdp=2, tensor=2)


def abstract(name: str, *methods: Any, **changes: Any) -> Any:
    """A model of CONFIGS with formats or methods applied."""
    config, task = CONFIGS[name]

    def make() -> Any:
        model = jpeft.models.from_config({**config, **changes}, task=task, rngs=nnx.Rngs(0))
        for method in methods:
            model = method(model, rngs=nnx.Rngs(0)) if isinstance(method, jpeft.Method) else method(model)
        return model

    return nnx.eval_shape(make)


def specs(model: Any, mesh: jax.sharding.Mesh, rules: Any = None) -> dict[str, P]:
    return {key: s.spec for part in jpeft.shardings(model, mesh, rules) for key, s in part.items()}


def test_a_mesh_is_named_sizes() -> None:
    assert dict(jpeft.make_mesh().shape) == {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}
    mesh = jpeft.make_mesh(data=2, fsdp=-1, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(jpeft.make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 2, "tensor": 3},
            r"data=2, fsdp=1, context=1, tensor=3 do not make up the 8 .* multiply to 6\)",
        ),
        ({"tensor": 3}, r"whose product divides 8, or leave one axis open"),
        ({"tensor": -1}, "data and tensor are both -1"),
        ({"fsdp": 0}, "fsdp=0; give a positive whole number"),
        ({"data": True}, "data=True; give a positive"),
    ],
)
def test_a_mesh_of_another_size_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=message):
        jpeft.make_mesh(**sizes)


def test_a_batch_is_dealt_out_along_the_data_axes(mesh: jax.sharding.Mesh) -> None:
    batch = jpeft.shard_batch({"ids": np.arange(24).reshape(8, 3), "n": jnp.arange(4)}, mesh)
    assert batch["ids"].sharding == batch_sharding(mesh) == NamedSharding(mesh, P(("data", "fsdp")))
    assert batch["ids"].addressable_shards[0].data.shape == (2, 3)
    assert jnp.array_equal(batch["ids"], np.arange(24).reshape(8, 3))
    with pytest.raises(jpeft.JpeftError, match=r"6 rows cannot be dealt out to 4 shards .* a multiple of 4 rows"):
        jpeft.shard_batch(np.zeros((6, 2)), mesh)
    with pytest.raises(jpeft.JpeftError, match="no rows"):
        jpeft.shard_batch(np.float32(1), mesh)


def test_weights_and_what_belongs_to_them(mesh: jax.sharding.Mesh) -> None:
    found = specs(abstract("llama", jpeft.LoRA(rank=2, targets="all-linear", dropout=0.1)), mesh)
    assert found["layers/self_attn/q_proj/kernel"] == P(None, "fsdp", "tensor")
    assert found["layers/mlp/down_proj/kernel"] == P(None, "tensor", "fsdp")
    assert found["embed_tokens/embedding"] == P("tensor", "fsdp")
    assert found["layers/self_attn/q_proj/lora/a"] == P(None, "fsdp", None)
    assert found["layers/self_attn/q_proj/lora/b"] == P(None, None, "tensor")
    assert found["layers/mlp/down_proj/lora/a"] == P(None, "tensor", None)
    assert found["layers/mlp/down_proj/lora/scale"] == found["norm/scale"] == P()
    bert = specs(abstract("bert", jpeft.BitFit()), mesh)
    assert bert["encoder/layer/attention/self/query/bias"] == P(None, "tensor")
    assert bert["encoder/layer/attention/self/query/bitfit/bias"] == P(None, "tensor")
    assert bert["encoder/layer/output/dense/bias"] == P(None, "fsdp")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (jpeft.IA3(), {"self_attn/k_proj/ia3/l": ("tensor",), "mlp/down_proj/ia3/l": ("tensor",)}),
        (jpeft.DoRA(rank=2), {"self_attn/o_proj/dora/m": ("fsdp",), "self_attn/o_proj/dora/squares": ("fsdp",)}),
        (jpeft.PTuningV2(num_virtual_tokens=3), {"self_attn/attention_fn/p_tuning_v2/keys": (None, "tensor", None)}),
        (
            jpeft.PrefixTuning(num_virtual_tokens=3, hidden_size=8),
            {"self_attn/attention_fn/prefix/w_out": (None, None, "tensor", None)},
        ),
        (
            jpeft.ParallelAdapter(bottleneck_size=6),
            {"mlp/parallel/down": ("fsdp", "tensor"), "mlp/parallel/up": ("tensor", "fsdp")},
        ),
        # 5 does not divide: the small array is whole there.
        (jpeft.Pfeiffer(bottleneck_size=5), {"mlp/down_proj/pfeiffer/down": ("fsdp", None)}),
        (jpeft.FullTuning(targets="mlp"), {"mlp/up_proj/full/kernel": ("fsdp", "tensor")}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, jpeft.Method) else "",
)
def test_methods_follow_what_they_adapt(
    method: jpeft.Method, expected: dict[str, tuple[Any, ...]], mesh: jax.sharding.Mesh
) -> None:
    found = specs(abstract("llama", method), mesh)
    for key, spec in expected.items():
        assert found[f"layers/{key}"] == P(None, *spec)


def test_layers_with_several_axes_on_a_side(mesh: jax.sharding.Mesh) -> None:
    model = nnx.eval_shape(lambda: jpeft.LoRA(rank=2)(zoo.MODELS["flax-attention"].make("float32"), rngs=0))
    found = specs(model, mesh, {"query": P("fsdp", "tensor"), "out": P("tensor", None, "fsdp")})
    assert found["attention/query/kernel"] == P("fsdp", "tensor", None)
    assert found["attention/query/bias"] == P("tensor", None)
    assert found["attention/query/lora/b"] == P(None, "tensor", None)
    assert found["attention/out/lora/a"] == P("tensor", None, None)
    assert found["attention/key/kernel"] == P()


def test_optimizer_state_follows_the_adapter(mesh: jax.sharding.Mesh) -> None:
    adapted = abstract("llama", jpeft.LoRA(rank=2))
    adapter, where = jpeft.partition(adapted).adapter, jpeft.shardings(adapted, mesh).adapter
    state: Any = jpeft.optimizer_shardings(optax.chain(optax.clip(1.0), optax.adam(1e-3)), adapter, where)
    adam = state[1][0]
    assert adam.mu == adam.nu == where
    assert adam.count.spec == P()
    factored = jpeft.optimizer_shardings(optax.adafactor(1e-3, min_dim_size_to_factor=2), adapter, where)
    shapes = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=2).init, adapter)
    for shape, at in zip(jax.tree.leaves(shapes), jax.tree.leaves(factored), strict=True):
        at.shard_shape(shape.shape)  # divides, or is whole


def test_a_users_model_has_rules_or_metadata(mesh: jax.sharding.Mesh) -> None:
    model = zoo.MODELS["user-list"].make("float32")
    assert set(specs(model, mesh).values()) == {P()}
    # The caller's rules come first, the first that fits decides, and one layer can be meant.
    rules = {"layers.1.up": P(), "up": P("fsdp", "tensor"), r"layers\.\d+\.norm": P("fsdp")}
    found = specs(model, mesh, rules)
    assert found["layers/0/up/kernel"] == P("fsdp", "tensor")
    assert found["layers/0/up/bias"] == P("tensor")
    assert found["layers/1/up/kernel"] == P()
    assert found["layers/2/norm/scale"] == P("fsdp")
    model.layers[0].down.kernel.set_metadata(out_sharding=("mlp", None), sharding_rules=(("mlp", "tensor"),))
    adapted = jpeft.LoRA(rank=2, targets="down")(model, rngs=0)  # Frozen keeps the metadata
    found = specs(adapted, mesh)
    assert found["layers/0/down/kernel"] == P("tensor", None)
    assert found["layers/0/down/lora/a"] == P("tensor", None)
    assert found["layers/1/down/lora/a"] == P()


def test_quantised_layers(mesh: jax.sharding.Mesh) -> None:
    found = specs(abstract("llama", jpeft.NF4(block_size=4), jpeft.LoRA(rank=2)), mesh)
    assert found["layers/self_attn/q_proj/codes"] == P(None, "tensor", "fsdp")
    assert found["layers/mlp/down_proj/codes"] == P(None, "fsdp", "tensor")
    assert found["layers/mlp/down_proj/lora/a"] == P(None, "tensor", None)
    with pytest.raises(jpeft.JpeftError, match=r"'layers/mlp/down_proj': .* no whole blocks, .*; or give rules="):
        specs(abstract("llama", jpeft.NF4(block_size=16)), mesh)


def test_what_does_not_fit_is_refused(mesh: jax.sharding.Mesh) -> None:
    model = abstract("llama", vocab_size=31)
    with pytest.raises(
        jpeft.JpeftError,
        match=r"'embed_tokens/embedding' \[31, 16\]: axis 0 of 31 cannot be cut into 2 shards along 'tensor'; sizes "
        r"that work: 1, 31\. Choose another mesh, or keep it whole with rules=\{'embed_tokens': P\(\)\}",
    ):
        specs(model, mesh)
    assert specs(model, mesh, {"embed_tokens": P(), "lm_head": P()})["embed_tokens/embedding"] == P()
    for rules, message in [
        ({"q_porj": P()}, r"match nothing in the model: 'q_porj' \(nearest: layers/self_attn/q_proj"),
        ({"q_proj": P("expert")}, r"'layers/self_attn/q_proj': the mesh has axes .* not 'expert'"),
        ({"q_proj": P("fsdp", "fsdp")}, "names the mesh axis 'fsdp' twice"),
        ({"q_proj": P("fsdp", None, "tensor")}, r"3 entries for a weight \[16, 32\]"),
        ({"norm": P(None, "fsdp")}, r"'norm/scale': the rule .* 2 entries for \[16\]"),
        ({"q_proj": "fsdp"}, "'q_proj': 'fsdp'; give a name or regular expression and a PartitionSpec"),
    ]:
        with pytest.raises(jpeft.JpeftError, match=message):
            specs(abstract("llama"), mesh, rules)


def test_another_mesh_without_some_axes() -> None:
    plain = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert set(specs(abstract("t5"), plain).values()) == {P()}


def test_an_abstract_model_is_placed_abstractly(mesh: jax.sharding.Mesh) -> None:
    made = jpeft.shard(abstract("llama", jpeft.LoRA(rank=2, dropout=0.5)), mesh)
    leaves = jax.tree.leaves(nnx.state(made))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None for leaf in leaves)
    assert any(isinstance(v, DropoutKey) for _, v in nnx.to_flat_state(nnx.state(made)))


class Annotated(nnx.Module):
    """A user's model whose layout is in its variables, as Flax's guide has it."""

    def __init__(self, rngs: nnx.Rngs):
        along = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
        self.first = nnx.Linear(8, 8, kernel_init=along, rngs=rngs)
        self.second = nnx.Linear(8, 8, kernel_init=along, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


@pytest.mark.parametrize(
    "method",
    [
        jpeft.LoRA(rank=2, targets="all-linear"),
        jpeft.IA3(targets=["second"], feed_forward=[]),
        jpeft.BitFit(),
        jpeft.FullTuning(targets="second"),
    ],
    ids=lambda method: type(method).__name__,
)
def test_layouts_in_metadata_need_no_current_mesh(method: jpeft.Method, mesh: jax.sharding.Mesh) -> None:
    with jax.set_mesh(mesh):
        model = Annotated(nnx.Rngs(0))
    base = model.first.kernel
    adapted = method(model, rngs=nnx.Rngs(1))
    found = specs(adapted, mesh)
    assert found["first/kernel"] == P("fsdp", "tensor")
    frozen = jpeft.partition(adapted).frozen
    assert frozen["first/kernel"] is base.get_value()
    for plain in (jpeft.strip(adapted), jpeft.merge(adapted)):
        assert type(plain.first.kernel) is type(base)
        assert plain.first.kernel.get_metadata() == base.get_metadata()
        assert set(specs(plain, mesh).values()) <= {P("fsdp", "tensor"), P("tensor"), P()}
