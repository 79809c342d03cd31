"""The kernel for few rows, interpreted, beside the product that XLA computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.quant import fused, linear
from jpeft.quant.formats import Format

FORMATS = {
    "nf4": jpeft.NF4(double_quant=False),
    "fp4, short blocks": jpeft.FP4(block_size=32, double_quant=False),
    "int4": jpeft.Int4(),
    "int4 from a minimum, in half precision": jpeft.Int4(block_size=128, symmetric=False, scale_dtype="float16"),
}


def _given(form: Format, inputs: int = 768, outputs: int = 384, rows: tuple[int, ...] = (2, 3)):
    kernel = form.quantize(jax.random.normal(jax.random.key(0), (inputs, outputs)) * 0.1)
    return jax.random.normal(jax.random.key(1), (*rows, inputs)).astype(jnp.bfloat16), kernel


@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_product_with_the_dequantised_weight(name: str) -> None:
    x, kernel = _given(FORMATS[name])
    assert fused.takes(6, x.dtype, kernel)
    ours = fused.product(x, kernel, interpret=True)
    assert ours.dtype == x.dtype
    weight = np.asarray(kernel.dequantize(jnp.bfloat16), np.float64)
    exact = np.asarray(x, np.float64) @ weight
    # Sums are float32; the result is rounded once, to 8 bits.
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8, atol=1e-5 * np.abs(exact).max())


def test_several_at_once_are_more_rows() -> None:
    x, kernel = _given(FORMATS["nf4"], rows=(4, 3))

    def one(x, kernel):
        return fused.product(x, kernel, interpret=True)

    together = one(x, kernel)
    np.testing.assert_array_equal(jax.vmap(one, (0, None))(x, kernel), together)
    program = str(jax.make_jaxpr(jax.vmap(one, (0, None)))(x, kernel))
    assert program.count("pallas_call") == 1
    assert "grid=(3, 3)" in program
    other = FORMATS["nf4"].quantize(-kernel.dequantize())
    both = jax.tree.map(lambda *arrays: jnp.stack(arrays), kernel, other)
    apart = jax.vmap(one)(x[:2], both)
    np.testing.assert_array_equal(apart[0], together[0])
    np.testing.assert_array_equal(apart[1], one(x[1], other))


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = _given(FORMATS["nf4"])
    called = []
    monkeypatch.setattr(fused, "product", lambda x, kernel: called.append(x.shape) or jnp.zeros((*x.shape[:-1], 384)))

    def ask(x, kernel=kernel, **settings):
        called.clear()
        linear.matmul(x, kernel, *settings.values())
        return bool(called)

    assert not ask(x)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert ask(x)
    assert not ask(x.astype(jnp.float32))
    assert not ask(jnp.zeros((fused.MOST_ROWS + 1, 768), jnp.bfloat16))
    assert not ask(x, precision="highest")
    assert not ask(jnp.zeros((2, 384), jnp.bfloat16), precision=None, turned=True)
    for form, inputs, outputs in ((FORMATS["nf4"], 192, 384), (FORMATS["nf4"], 768, 200), (jpeft.Int8(), 768, 384)):
        assert not ask(*_given(form, inputs, outputs))


def test_its_gradient_is_that_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = _given(FORMATS["nf4"])
    wanted = jax.grad(lambda x: linear.matmul(x, kernel).astype(jnp.float32).sum())(x)
    real = fused.product
    monkeypatch.setattr(fused, "product", lambda x, kernel: real(x, kernel, interpret=True))
    monkeypatch.setattr(linear, "platform_of", lambda at: "tpu")
    ours = jax.grad(lambda x: linear.matmul(x, kernel).astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(ours, wanted)
