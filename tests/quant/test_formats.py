"""What all formats of quantised weights have in common; parity with bitsandbytes is in tests/parity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.quant import QuantizedLinear, format_of

# Rows that are whole blocks, and rows that are not.
FORMATS = [
    jpeft.NF4(),
    jpeft.FP4(double_quant=False),
    jpeft.Int4(block_size=32),
    jpeft.Int4(block_size=32, symmetric=False, scale_dtype="float16"),
    jpeft.Int8(),
    jpeft.Int8(block_size=32, scale_dtype="float16"),
]
each_format = pytest.mark.parametrize(
    "form", FORMATS, ids=lambda form: f"{form.kind}-{getattr(form, 'symmetric', '')}{getattr(form, 'block_size', '')}"
)


def kernel(*shape: int, dtype: str = "float32") -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape).astype(dtype)


@each_format
@pytest.mark.parametrize("features_in", [64, 45])
def test_layers_are_quantised_one_by_one_and_traced_as_eagerly(form: jpeft.NF4, features_in: int) -> None:
    # A last block of zeros that is not full has a scale below what compiled code can compute with.
    small = 0 if features_in == 64 else 0.01
    stacked = kernel(3, features_in, 7, dtype="bfloat16") * jnp.array([1, small, 100], jnp.bfloat16)[:, None, None]
    whole = form.quantize(stacked)
    traced = jax.jit(form.quantize)(stacked)
    assert traced.dequantize().dtype == jnp.bfloat16
    for index, layer in enumerate(stacked):
        alone = form.quantize(layer)
        assert alone.arrays.keys() == whole.arrays.keys() == traced.arrays.keys()
        for name, array in alone.arrays.items():
            assert jnp.array_equal(whole.arrays[name][index], array)
            assert jnp.array_equal(traced.arrays[name][index], array)
        assert jnp.array_equal(whole.dequantize()[index], alone.dequantize())
    assert jnp.any(whole.dequantize()[1]) == (small > 0)
    assert jax.eval_shape(form.quantize, jax.ShapeDtypeStruct((features_in, 7), jnp.float32)).shape == (features_in, 7)


@each_format
def test_no_value_is_further_off_than_half_a_step(form: jpeft.NF4) -> None:
    weight = kernel(64, 6)
    q = form.quantize(weight)
    block = getattr(form, "block_size", None) or 64
    largest = jnp.abs(weight.T.reshape(6, -1, block)).max(-1, keepdims=True)
    spread = (weight.T.reshape(6, -1, block).max(-1) - weight.T.reshape(6, -1, block).min(-1))[..., None]
    off = jnp.abs((q.dequantize() - weight).T.reshape(6, -1, block))
    # Half of the widest gap in the code book; half of a step; rounding of scales comes on top.
    step = {"nf4": 0.152 * largest, "fp4": 0.167 * largest, "int4": largest / 8, "int8": largest / 254}[form.kind]
    if form.kind == "int4" and not form.symmetric:
        step = spread / 30
    assert jnp.all(off <= step * 1.02)


def test_bits_per_weight() -> None:
    weight = kernel(1024, 512)
    bits = {form: 8 * form.quantize(weight).nbytes / weight.size for form in (jpeft.NF4(), jpeft.Int8())}
    assert bits[jpeft.NF4()] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / weight.size)  # 4.127
    assert bits[jpeft.Int8()] == 8 + 32 / 1024


def test_a_quantised_kernel_is_a_pytree() -> None:
    q = jpeft.NF4().quantize(kernel(64, 6))
    again = jax.tree.map(lambda array: array, q)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    assert jnp.array_equal(jax.jit(lambda q: q.dequantize())(q), q.dequantize())
    assert jnp.array_equal(q.scales, jax.jit(lambda q: q.scales)(q))


def test_what_cannot_be_quantised_is_refused() -> None:
    for odd in (jnp.ones(3), jnp.ones((2, 2), jnp.int32), jnp.ones((2, 0))):
        with pytest.raises(jpeft.JpeftError, match=r"NF4: \w+\[.*\] is no kernel"):
            jpeft.NF4().quantize(odd)
    with pytest.raises(jpeft.JpeftError, match="not finite"):
        jpeft.Int8().quantize(jnp.array([[1.0, jnp.nan]]))
    with pytest.raises(jpeft.JpeftError, match="scale_dtype='float32'"):
        jpeft.Int4(scale_dtype="float16").quantize(jnp.full((2, 2), 1e9))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: jpeft.NF4(block_size=7), "block_size=7: expected a multiple of 2"),
        (lambda: jpeft.FP4(double_quant=1), "double_quant=1"),
        (lambda: jpeft.Int4(symmetric="yes"), "symmetric='yes'"),
        (lambda: jpeft.Int8(block_size=0), "block_size=0"),
        (lambda: jpeft.Int8(scale_dtype="int8"), "scale_dtype='int8'"),
        (lambda: jpeft.NF4(compute_dtype="tf32"), "compute_dtype='tf32'"),
        (lambda: format_of("nf5"), "'nf5' is no format of quantised weights; choose one of nf4"),
    ],
)
def test_settings_are_checked(make: object, said: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=said):
        make()  # type: ignore[operator]


def test_formats_by_name() -> None:
    assert isinstance(jpeft.quantize(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), "int8"), QuantizedLinear)
    assert [format_of(name) for name in ("nf4", "fp4", "int4", "int8")] == [
        jpeft.NF4(),
        jpeft.FP4(),
        jpeft.Int4(),
        jpeft.Int8(),
    ]
    assert jpeft.NF4(targets=["up"], compute_dtype="bfloat16").bare() == jpeft.NF4()
    assert jpeft.Int4().to_dict() == {"format": "int4", "block_size": 64, "symmetric": True, "scale_dtype": "float32"}
    assert np.array_equal(jpeft.NF4().quantize(np.ones((2, 2), np.float32)).dequantize(), np.ones((2, 2)))
