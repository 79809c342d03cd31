"""Quantised layers over a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.quant import QuantizedLinear, partition_specs
from jpeft.variables import Quantized


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def linear(features_in: int = 64, features_out: int = 12) -> nnx.Linear:
    return nnx.Linear(features_in, features_out, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("form", [jpeft.NF4(block_size=16), jpeft.Int4(block_size=8, symmetric=False), jpeft.Int8()])
def test_a_sharded_layer_computes_the_same(form: jpeft.NF4, mesh: jax.sharding.Mesh) -> None:
    layer = form(linear())
    assert isinstance(layer, QuantizedLinear)
    specs = partition_specs(layer, P("fsdp", "tensor"), mesh)
    assert specs["codes"] == P("tensor", "fsdp")
    assert specs["bias"] == P("tensor")
    x = jax.random.normal(jax.random.key(1), (8, 64))
    graphdef, state = nnx.split(layer)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    placed = jax.tree.map(lambda a: a, state)
    for name, spec in specs.items():
        placed[name].set_value(jax.device_put(placed[name].get_value(), NamedSharding(mesh, spec)))
    assert placed["codes"].get_value().addressable_shards[0].data.size * 8 == layer.codes.size
    assert jnp.allclose(run(placed, x), run(state, x), rtol=1e-5, atol=1e-6)


def test_a_mesh_that_would_cut_blocks_is_refused(mesh: jax.sharding.Mesh) -> None:
    with pytest.raises(jpeft.JpeftError, match=r"in axis has 3 blocks of 64 inputs, which 4 .* sizes that work: 1, 3$"):
        partition_specs(jpeft.NF4()(linear(192)), P("fsdp"), mesh)
    with pytest.raises(
        jpeft.JpeftError, match=r"out axis has 12 output .* 8 shards .* sizes that work: 1, 2, 3, 4, 6, 12"
    ):
        partition_specs(jpeft.NF4()(linear()), P(None, ("fsdp", "tensor")), mesh)
    odd = jpeft.NF4()(linear(60))
    with pytest.raises(jpeft.JpeftError, match="its rows are no whole blocks"):
        partition_specs(odd, P("fsdp"), mesh)
    with pytest.raises(jpeft.JpeftError, match="not 'expert'"):
        partition_specs(odd, P("expert"), mesh)
    assert set(partition_specs(odd, P(), mesh).values()) == {P(), P(None)}


def test_layer_axes_are_not_sharded(mesh: jax.sharding.Mesh) -> None:
    stacked = jpeft.NF4()(jpeft.Stack.create(lambda rngs: nnx.Linear(256, 4, rngs=rngs), 3, rngs=nnx.Rngs(0))).layer
    specs = partition_specs(stacked, P("fsdp"), mesh)
    assert specs["codes"] == specs["scale_codes"] == P(None, None, "fsdp")
    assert specs["scale_scales"] == specs["scale_offset"] == P(None)
    assert specs.keys() - {"bias"} == {name for name, v in vars(stacked).items() if isinstance(v, Quantized)}
