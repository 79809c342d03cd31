"""Quantised linear layers in models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft import kinds
from jpeft.quant import QuantizedLinear
from tests import zoo

FORM = jpeft.NF4(block_size=4)


def stack(**kwargs: Any) -> zoo.UserModel:
    return zoo.UserModel(nnx.Rngs(0), stacked=True, **kwargs)


def run(model: Any) -> jax.Array:
    parts = jpeft.partition(model)
    return jax.jit(lambda *arrays: jpeft.combine(parts.graphdef, *arrays)(zoo.ids()))(*parts[1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_as_a_linear_layer_with_the_dequantised_kernel(dtype: str) -> None:
    for compute in (None, "bfloat16"):
        linear = nnx.Linear(12, 5, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        linear.bias.set_value(jnp.arange(5, dtype=dtype))
        form = jpeft.Int8(compute_dtype=compute)
        quantized = form(linear)
        assert isinstance(quantized, QuantizedLinear)
        assert quantized.bias.get_value() is linear.bias.get_value()
        plain = quantized.plain()
        assert plain.kernel.dtype == dtype
        assert jnp.array_equal(plain.kernel[...], form.quantize(linear.kernel[...]).dequantize())
        x = jax.random.normal(jax.random.key(1), (2, 3, 12))
        made, expected = quantized(x), plain(x)
        assert made.dtype == expected.dtype == (compute or "float32")
        # The codes lie as [out, in]: these are the very products, those of `plain` are summed in another order.
        weight, bias = plain.kernel[...].T.astype(made.dtype), linear.bias[...].astype(made.dtype)
        over = (((2,), (1,)), ((), ()))
        assert jnp.array_equal(made, jax.lax.dot_general(x.astype(made.dtype), weight, over) + bias)
        size = np.abs(x) @ np.abs(plain.kernel[...].astype("float32")) + np.abs(linear.bias[...].astype("float32"))
        apart = np.abs(made.astype("float32") - expected.astype("float32"))
        assert np.all(apart <= 4 * jnp.finfo(made.dtype).eps * size)


def test_what_is_quantised_and_what_stays() -> None:
    base = zoo.MODELS["llama"].make("float32")
    before = jpeft.partition(base).frozen
    made = FORM(base)
    after = jpeft.partition(made).frozen
    assert type(made.layers.layer.mlp.up_proj.codes) is jpeft.Quantized
    stays = {"embed_tokens/embedding", "lm_head/kernel", "norm/scale"} | {k for k in before if "layernorm" in k}
    assert before.keys() & after.keys() == stays
    assert all(after[key] is before[key] for key in stays)
    assert jpeft.partition(base).frozen.keys() == before.keys()
    head = jpeft.NF4(targets=["lm_head"])(base)
    assert isinstance(head.lm_head, QuantizedLinear)
    some = jpeft.partition(jpeft.NF4(exclude=["mlp"])(base)).frozen
    assert "layers/mlp/up_proj/kernel" in some
    assert "layers/self_attn/q_proj/codes" in some
    # LoRA's targets mean quantised layers as well as plain ones.
    assert len(jpeft.partition(jpeft.LoRA(targets=[nnx.Linear], exclude=["lm_head"])(made, rngs=0)).adapter) == 14


def test_refusals() -> None:
    made = FORM(stack())
    with pytest.raises(jpeft.JpeftError, match=r"Int8: 'layers/up' is quantised already \(NF4.*exclude it"):
        jpeft.Int8(targets=["up"])(made)
    with pytest.raises(jpeft.JpeftError, match="'embed', a Embed; NF4 can wrap Linear"):
        jpeft.NF4(targets=["embed"])(stack())
    with pytest.raises(jpeft.JpeftError, match="Linear.* multiplies in a way of its own"):
        jpeft.NF4()(nnx.Linear(4, 4, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)))
    with pytest.raises(jpeft.JpeftError, match="not a dict"):
        jpeft.NF4()({})  # type: ignore[type-var]
    broken = stack()
    broken.layers.layer.up.kernel.set_value(broken.layers.layer.up.kernel[...].at[1, 0, 0].set(jnp.inf))
    with pytest.raises(jpeft.JpeftError, match=r"not finite \('layers/up'\)"):
        FORM(broken)
    with pytest.raises(jpeft.JpeftError, match="dequantise the base first"):
        kinds.weight(made.layers.layer.up)


def test_methods_ask_for_dense_weights() -> None:
    made = FORM(stack())
    up = jpeft.LoRA(rank=2)(made, rngs=0).layers.layer.up
    assert (kinds.kind_of(up), kinds.own_shape(up), kinds.lead(up)) == (nnx.Linear, (zoo.WIDTH, 20), (3,))
    whole = kinds.dense_weight(up)
    assert jnp.array_equal(whole, FORM.quantize(stack().layers.layer.up.kernel[...]).dequantize())
    assert jnp.array_equal(kinds.dense_weight(up, layers=(2, 0)), whole[jnp.array([2, 0])])


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """The same LoRA on a quantised stack (some layers, no remat) and on its dequantised twin."""
    quantized = FORM(stack())
    method = jpeft.LoRA(rank=2, layers=[1, 2])
    return method(quantized, rngs=0), method(jpeft.merge(quantized, dequantize=True), rngs=0)


def test_derivatives_of_both_orders_equal_those_of_the_dense_layer(pair: tuple[Any, Any]) -> None:
    results = []
    for model in pair:
        parts = jpeft.partition(model)

        def loss(adapter: Any, frozen: Any, parts: Any = parts) -> jax.Array:
            return jnp.mean(jpeft.combine(parts.graphdef, adapter, parts.buffers, frozen)(zoo.ids()) ** 2)

        def slope(adapter: Any, frozen: Any, loss: Any = loss) -> tuple[jax.Array, Any]:
            gradient = jax.grad(loss)(adapter, frozen)
            return sum(jnp.sum(value**2) for value in gradient.values()), gradient

        results.append(jax.jit(jax.grad(slope, has_aux=True))(zoo.trained(parts), parts.frozen))
    for ours, dense in zip(*results, strict=True):
        assert all(zoo.relative(ours[key], dense[key]) < 1e-4 for key in dense)


def test_step_temporaries_hold_one_dequantised_layer() -> None:
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.square = nnx.Linear(128, 128, use_bias=False, rngs=rngs)

        def __call__(self, x: jax.Array, index: Any) -> jax.Array:
            return nnx.tanh(self.square(x))

    def temporaries(depth: int, remat: bool) -> int:
        def make() -> Any:
            return jpeft.LoRA(rank=1)(
                jpeft.NF4()(jpeft.Stack.create(Layer, depth, rngs=nnx.Rngs(0), remat=remat)), rngs=0
            )

        graphdef, *arrays = jpeft.partition(nnx.eval_shape(make))

        def loss(adapter: Any, buffers: Any, frozen: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(jpeft.combine(graphdef, adapter, buffers, frozen)(x))

        lowered = jax.jit(jax.grad(loss)).lower(*arrays, jax.ShapeDtypeStruct((2, 128), jnp.float32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    for remat in (False, True):
        assert (temporaries(9, remat) - temporaries(3, remat)) / 6 < 128 * 128 / 2  # not even the codes of a layer


def test_many_adapters_share_one_dequantised_weight(pair: tuple[Any, Any]) -> None:
    parts = jpeft.partition(pair[0])
    adapters = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(zoo.trained(parts, seed) for seed in range(5)))

    def loss(adapter: Any) -> jax.Array:
        return jnp.mean(jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)(zoo.ids()) ** 2)

    program = str(jax.make_jaxpr(jax.vmap(jax.grad(loss)))(adapters))
    assert "f32[20,12]" in program  # a weight (out, in), dequantised
    assert "f32[5,20,12]" not in program
    assert "u8[5," not in program


def test_merging() -> None:
    base = stack()
    adapted = jpeft.LoRA(rank=2, targets=["up"])(FORM(base), rngs=0)
    parts = jpeft.partition(adapted)
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    with pytest.raises(jpeft.JpeftError, match=r"layers/up \(lora\): its base is quantised .* dequantize=True"):
        jpeft.merge(model)
    with pytest.raises(jpeft.JpeftError, match="not both"):
        jpeft.merge(model, dequantize=True, requantize=True)
    whole = jpeft.merge(model, dequantize=True)
    assert jpeft.partition(whole).frozen.keys() == jpeft.partition(base).frozen.keys()
    assert zoo.relative(run(whole), run(model)) < 1e-5
    with pytest.warns(UserWarning, match=r"1 merged weights .* \d+\.\d+% at layers/up"):
        again = jpeft.merge(model, requantize=True)
    packed = jpeft.partition(again).frozen
    assert packed.keys() == jpeft.partition(FORM(base)).frozen.keys()
    assert packed["layers/down/codes"] is parts.frozen["layers/down/codes"]
    expected = FORM.quantize(jpeft.partition(whole).frozen["layers/up/kernel"])
    assert jnp.array_equal(packed["layers/up/codes"], expected.codes)
    assert jnp.array_equal(jpeft.strip(model).layers.layer.up.codes[...], parts.frozen["layers/up/codes"])


def test_a_model_with_adapters_can_be_quantised_under_them() -> None:
    adapted = jpeft.LoRA(rank=2)(stack(), rngs=0)
    made = FORM(adapted)
    expected = jpeft.partition(jpeft.LoRA(rank=2)(FORM(stack()), rngs=0))
    parts = jpeft.partition(made)
    assert parts.graphdef == expected.graphdef
    assert all(jnp.array_equal(parts.frozen[key], value) for key, value in expected.frozen.items())


def test_an_adapter_loads_onto_the_same_quantisation_only(tmp_path: Any) -> None:
    adapted = jpeft.LoRA(rank=2, targets=["up"])(FORM(stack()), rngs=0)
    path = jpeft.save_adapter(tmp_path / "adapter", adapted)
    loaded = jpeft.load_adapter(path, FORM(stack()))
    assert jnp.array_equal(loaded.layers.layer.up.a[...], adapted.layers.layer.up.a[...])
    others = {
        "not quantised": stack(),
        "double_quant': False": jpeft.NF4(block_size=4, double_quant=False)(stack()),
        "'format': 'fp4'": jpeft.FP4(block_size=4)(stack()),
    }
    for said, base in others.items():
        for check in (True, False):
            with pytest.raises(jpeft.JpeftError, match=rf"'layers/down', 'layers/up' .* trained on: .*here: .*{said}"):
                jpeft.load_adapter(path, base, check_base=check)
    other = stack()
    other.layers.layer.up.kernel.set_value(-other.layers.layer.up.kernel[...])
    with pytest.raises(jpeft.JpeftError, match="the values of 'layers/up/codes' differ"):
        jpeft.load_adapter(path, FORM(other))
