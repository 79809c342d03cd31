"""Adapters of any layers taken away: what is left, that it costs nothing, and that it can be saved and served."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jpeft
from tests import zoo


@functools.cache
def adapted(name: str, method: jpeft.Method) -> Any:
    """A model with nothing at its initial value."""
    parts = jpeft.partition(method(zoo.MODELS[name].make("float32"), rngs=0))
    return jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)


def scaled_to_zero(model: Any, layers: list[int]) -> Any:
    """By hand: the scales of these layers' adapters at 0."""
    parts = jpeft.partition(model)
    buffers = {
        key: value.at[jnp.array(layers)].set(0) if key.endswith("scale") else value
        for key, value in parts.buffers.items()
    }
    return jpeft.combine(parts.graphdef, parts.adapter, buffers, parts.frozen)


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [0, 1, 2]])
def test_any_layers_go_without(layers: list[int]) -> None:
    model = adapted("llama", jpeft.Houlsby(bottleneck_size=3))
    dropped = jpeft.drop_adapters(model, layers)
    assert zoo.relative(dropped(zoo.ids()), scaled_to_zero(model, layers)(zoo.ids())) < 1e-5
    adapter = jpeft.partition(dropped).adapter
    shapes = {key: value.shape for key, value in adapter.items() if key.endswith("/down")}
    places = ("self_attn/o_proj", "mlp/down_proj") if len(layers) < 3 else ()
    assert shapes == {f"layers/{at}/houlsby/down": (3 - len(layers), zoo.WIDTH, 3) for at in places}
    assert adapter["layers/input_layernorm/houlsby/scale"].shape == (3, zoo.WIDTH)  # norms are no adapters


def test_layers_in_a_list_and_in_an_encoder_decoder() -> None:
    method = jpeft.Pfeiffer(targets="down", bottleneck_size=3)
    listed = jpeft.drop_adapters(adapted("user-list", method), range(2))
    assert {key.split("/")[1] for key in jpeft.partition(listed).adapter} == {"2"}
    stacked = jpeft.drop_adapters(adapted("user-stack-remat", method), [0])
    again = jpeft.drop_adapters(stacked, [1])
    expected = scaled_to_zero(adapted("user-stack-remat", method), [0, 1])
    assert zoo.relative(again(zoo.ids()), expected(zoo.ids())) < 1e-5
    both = jpeft.compose(jpeft.Pfeiffer(), jpeft.DropAdapters(layers=[0]))
    t5 = jpeft.partition(nnx.eval_shape(lambda: both(zoo.MODELS["t5"].make("float32"), rngs=0))).adapter
    assert t5["encoder/block/layer/1/DenseReluDense/wo/pfeiffer/down"].shape[0] == 2
    assert t5["decoder/block/layer/2/DenseReluDense/wo/pfeiffer/down"].shape[0] == 1


def test_dropped_layers_are_not_computed() -> None:
    model = adapted("llama", jpeft.Pfeiffer(bottleneck_size=500))

    def lowered(model: Any) -> str:
        parts = jpeft.partition(model)
        return jax.jit(lambda *arrays: jpeft.combine(parts.graphdef, *arrays)(zoo.ids())).lower(*parts[1:]).as_text()

    # One loop over all layers; or one over those without and another over the last, with weights of one layer.
    whole, upper = lowered(model), lowered(jpeft.drop_adapters(model, [0, 1]))
    assert upper.count("stablehlo.while") == whole.count("stablehlo.while") + 1
    assert "3x12x500xf32" in whole
    assert "3x12x500xf32" not in upper
    assert "1x12x500xf32" in upper
    assert "500xf32" not in lowered(jpeft.drop_adapters(model, range(3)))


def test_what_is_left_trains_with_its_dropout() -> None:
    parts = jpeft.partition(
        jpeft.drop_adapters(adapted("llama", jpeft.Houlsby(bottleneck_size=3, dropout=0.1, drop=2)), [0, 1])
    )

    @jax.jit
    def loss(adapter: Any) -> jax.Array:
        model = jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen, dropout=jax.random.key(0))
        return jnp.sum(model(zoo.ids()) ** 2)

    assert all(bool(jnp.any(value != 0)) for value in jax.grad(loss)(parts.adapter).values())
    assert parts.buffers["layers/mlp/down_proj/houlsby/depth"].tolist() == [2]


def test_layers_without_adapters_are_refused() -> None:
    model = adapted("llama", jpeft.Pfeiffer(layers=[1, 2]))
    with pytest.raises(jpeft.JpeftError, match=r"layers=\[0, 7\] have no adapter to drop"):
        jpeft.drop_adapters(model, [0, 7])
    with pytest.raises(jpeft.JpeftError, match="no adapter to drop; the model has none in any"):
        jpeft.drop_adapters(adapted("llama", jpeft.LoRA(rank=2)), [0])
    with pytest.raises(jpeft.JpeftError, match="give the numbers"):
        jpeft.drop_adapters(model, None)
