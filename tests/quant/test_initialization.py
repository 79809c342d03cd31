"""LoftQ and PiSSA: base plus update is close to the weight, closer than quantisation alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.quant import loftq, pissa, qpissa

WEIGHT = jax.random.normal(jax.random.key(0), (2, 64, 24)) * jnp.linspace(0.1, 3, 24)


def error(base: jax.Array, a: jax.Array, b: jax.Array) -> float:
    return float(jnp.linalg.norm(WEIGHT - base - a @ b) / jnp.linalg.norm(WEIGHT))


def test_pissa_splits_a_weight_exactly() -> None:
    residual, a, b = pissa(WEIGHT.astype(jnp.bfloat16), 4)
    assert (a.shape, b.shape, residual.dtype) == ((2, 64, 4), (2, 4, 24), jnp.float32)
    assert jnp.allclose(residual + a @ b, WEIGHT.astype(jnp.bfloat16), atol=1e-5)
    values = jnp.linalg.svd(WEIGHT.astype(jnp.bfloat16).astype(jnp.float32), compute_uv=False)
    # What is left has the smaller singular values, and both factors have the roots of the larger ones.
    assert jnp.allclose(jnp.linalg.svd(residual, compute_uv=False)[:, :20], values[:, 4:], rtol=1e-4)
    for factor in (a.swapaxes(1, 2), b):
        assert jnp.allclose(jnp.linalg.norm(factor, axis=-1) ** 2, values[:, :4], rtol=1e-4)


@pytest.mark.parametrize("start", [loftq, qpissa])
def test_the_update_makes_up_for_quantisation(start: object) -> None:
    form = jpeft.NF4(double_quant=False)
    plain = error(form.quantize(WEIGHT).dequantize(), jnp.zeros((2, 64, 1)), jnp.zeros((2, 1, 24)))
    errors = []
    for iterations in (1, 5):
        quantized, a, b = start(WEIGHT, form, 8, iterations)  # type: ignore[operator]
        assert quantized.format == form
        errors.append(error(quantized.dequantize(), a, b))
    assert errors[0] < 0.9 * plain
    assert errors[1] < errors[0]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(jpeft.JpeftError, match=r"rank=25: .* \[64, 24\] has between 1 and 24"):
        pissa(WEIGHT, 25)
    with pytest.raises(jpeft.JpeftError, match="iterations=0"):
        loftq(WEIGHT, jpeft.NF4(), 2, 0)
