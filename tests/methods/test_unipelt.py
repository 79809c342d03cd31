"""MAM and UniPELT: their formulas, what open and closed gates leave, and gates that can be looked at."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests import zoo

PARTS = {"projections": ["query", "value"], "attention": "attention", "outputs": "attention.out"}
SMALL = {"num_virtual_tokens": 3, "reparameterize": False, "rank": 2, "bottleneck_size": 5}


@functools.cache
def base(name: str) -> Any:
    return zoo.MODELS[name].make("float32")


def with_values(adapted: Any, values: dict[str, Any]) -> Any:
    parts = jpeft.partition(adapted)
    return jpeft.combine(parts.graphdef, {**parts.adapter, **values}, parts.buffers, parts.frozen)


def test_mam_is_its_two_parts() -> None:
    method = jpeft.methods.from_dict({"method": "mam", "num_virtual_tokens": 3, "hidden_size": 5, "layers": [1]})
    made = jpeft.partition(method(base("bert-mean-classifier"), rngs=0))
    prefix = jpeft.PrefixTuning(num_virtual_tokens=3, hidden_size=5, layers=[1], name="mam")
    both = jpeft.compose(prefix, jpeft.ParallelAdapter(layers=[1], name="mam"))(base("bert-mean-classifier"), rngs=0)
    assert made.graphdef == jpeft.partition(both).graphdef
    assert all(jnp.array_equal(value, jpeft.partition(both).adapter[key]) for key, value in made.adapter.items())
    assert jpeft.methods.MAM.from_dict(method.to_dict()) == method


def test_unipelt_is_its_formula_on_flax_attention() -> None:
    """The equations of the module's docstring, in NumPy."""
    model = base("flax-attention")
    adapted = jpeft.UniPELT(alpha=3.0, **PARTS, **SMALL)(model, rngs=0)
    parts = jpeft.partition(adapted)
    values = zoo.trained(parts, size=0.5)
    x = np.asarray(jax.random.normal(jax.random.key(2), (zoo.BATCH, zoo.TIME, zoo.WIDTH)))
    arrays = {key: np.asarray(v) for key, v in {**values, **parts.frozen, **parts.buffers}.items() if "rngs" not in key}

    def gate(at: str, x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(x @ arrays[f"{at}/unipelt/gate"] + arrays[f"{at}/unipelt/gate_bias"])))

    def projected(name: str) -> np.ndarray:
        at = f"attention/{name}"
        y = np.einsum("btd,dnh->btnh", x, arrays[f"{at}/kernel"]) + arrays[f"{at}/bias"]
        if name == "key":
            return y
        update = 3.0 / 2 * x @ arrays[f"{at}/unipelt/a"] @ arrays[f"{at}/unipelt/b"]
        return y + (gate(at, x)[..., None] * update).reshape(y.shape)

    def rows(name: str) -> np.ndarray:
        own = np.broadcast_to(arrays[f"attention/attention_fn/unipelt/{name}s"], (zoo.BATCH, 3, 4, 4))
        return np.concatenate([own, projected(name)], axis=1)

    weights = np.exp(np.einsum("btnh,bsnh->bnts", projected("query"), rows("key")) / np.sqrt(4))
    weights[..., :3] *= gate("attention", x)[:, None, :, None]
    weights[..., 3:] *= np.tri(zoo.TIME)
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bnts,bsnh->btnh", weights, rows("value"))
    y = np.einsum("btnh,nhd->btd", mixed, arrays["attention/out/kernel"]) + arrays["attention/out/bias"]
    down, down_bias, up, up_bias = (
        arrays[f"attention/out/unipelt/{n}"] for n in ("down", "down_bias", "up", "up_bias")
    )
    y += gate("attention/out", y)[..., None] * (np.maximum(y @ down + down_bias, 0) @ up + up_bias)
    assert zoo.relative(with_values(adapted, values)(jnp.asarray(x)), jnp.asarray(x + y)) < 1e-5


def test_closed_gates_leave_the_base_and_open_ones_the_parts() -> None:
    model = base("flax-attention")  # it knows no positions: a prefix that nobody sees changes nothing
    x = jax.random.normal(jax.random.key(2), (zoo.BATCH, zoo.TIME, zoo.WIDTH))
    adapted = jpeft.UniPELT(**PARTS, **SMALL)(model, rngs=0)
    values = zoo.trained(jpeft.partition(adapted))

    def with_gates(bias: float) -> jax.Array:
        set_to = {key: jnp.full(v.shape, bias) for key, v in values.items() if key.endswith("gate_bias")}
        return with_values(adapted, {**values, **set_to})(x)

    assert zoo.relative(with_gates(-60.0), with_values(model, {})(x)) < 1e-6
    prefix = jpeft.PrefixTuning(num_virtual_tokens=3, reparameterize=False, targets="attention", name="unipelt")
    adapter = jpeft.Pfeiffer(bottleneck_size=5, targets="attention.out", name="unipelt")
    lora = jpeft.LoRA(rank=2, targets=["query", "value"], name="unipelt")
    parts = jpeft.compose(prefix, adapter, lora)(model, rngs=0)
    shapes = {key: value.shape for key, value in jpeft.partition(parts).adapter.items()}
    ungated = {key: value.reshape(shapes[key]) for key, value in values.items() if "/gate" not in key}
    assert ungated.keys() == shapes.keys()
    assert zoo.relative(with_gates(60.0), with_values(parts, ungated)(x)) < 1e-5


def test_gates_can_be_looked_at() -> None:
    adapted = jpeft.UniPELT(layers=[0, 2], variant="AP", **SMALL)(base("llama"), rngs=0)
    values = zoo.trained(jpeft.partition(adapted), size=0.3)
    seen = jpeft.observe(with_values(adapted, values), zoo.ids())
    places = ("mlp/down_proj", "self_attn")
    assert seen.keys() == {f"layers/{layer}/{at}/unipelt/gate" for layer in (0, 2) for at in places}
    assert all(
        value.shape == (zoo.BATCH, zoo.TIME) and bool(jnp.all((value > 0) & (value < 1))) for value in seen.values()
    )
    model = base("llama")
    normed = model.layers.unstack()[0].input_layernorm(model.embed_tokens(zoo.ids()))
    at = "layers/self_attn/unipelt"
    first = jax.nn.sigmoid(normed @ values[f"{at}/gate"][0] + values[f"{at}/gate_bias"][0])
    assert zoo.relative(seen["layers/0/self_attn/unipelt/gate"], first) < 1e-5
    served = jpeft.multi(adapted, [({**jpeft.partition(adapted).adapter, **values}, jpeft.partition(adapted).buffers)])
    rows = jpeft.observe(served, zoo.ids(), adapter_ids=jnp.zeros(zoo.BATCH, jnp.int32))
    assert all(zoo.relative(rows[key], value) < 1e-5 for key, value in seen.items())
    shut = {f"{at}/gate_bias": jnp.array([-60.0, 60.0])}
    seen = jpeft.observe(with_values(adapted, {**values, **shut}), zoo.ids())
    assert float(jnp.max(seen["layers/0/self_attn/unipelt/gate"])) < 1e-6
    assert float(jnp.min(seen["layers/2/self_attn/unipelt/gate"])) > 0.999
    with pytest.raises(jpeft.JpeftError, match="nothing to show|anything to show"):
        jpeft.observe(base("llama"), zoo.ids())


def test_baked() -> None:
    adapted = jpeft.UniPELT(num_virtual_tokens=3, hidden_size=5, rank=2, **PARTS)(base("flax-attention"), rngs=0)
    adapted = with_values(adapted, zoo.trained(jpeft.partition(adapted)))
    baked = jpeft.bake(adapted)
    x = jax.random.normal(jax.random.key(2), (zoo.BATCH, zoo.TIME, zoo.WIDTH))
    assert zoo.relative(baked(x), adapted(x)) < 1e-5
    (method,) = jpeft.applied(baked)
    again = jpeft.partition(method(base("flax-attention"), rngs=0)).adapter  # so that it can be saved and loaded
    kept = jpeft.partition(baked).adapter
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in kept.items()}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"variant": "LP"}, "UniPELT: variant='LP'; choose 'AP' or 'APL'"),
        ({"rank": 0}, "UniPELT: rank=0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"activation": "sine"}, "activation='sine'"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=said):
        jpeft.UniPELT(**settings)
