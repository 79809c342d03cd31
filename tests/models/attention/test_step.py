"""One query per row against `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.models.attention.step import attend_step


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(
    ("mask_shape", "bias_shape"), [(None, None), ((3, 1), None), ((3, 6), (1, 6)), ((1, 1), (3, 6))]
)
@pytest.mark.parametrize("scale", [None, 1.0])
def test_equals_the_general_function(groups, mask_shape, bias_shape, scale):
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (3, 1, 6, 8))
    k, v = (jax.random.normal(key, (3, 11, groups, 8)) for key in keys[1:3])
    mask = None if mask_shape is None else jax.random.bernoulli(keys[3], 0.6, (*mask_shape, 1, 11)).at[..., 0].set(True)
    bias = None if bias_shape is None else jax.random.normal(keys[4], (*bias_shape, 1, 11))
    expected = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)
    np.testing.assert_allclose(attend_step(q, k, v, mask=mask, bias=bias, scale=scale), expected, atol=1e-6)


def test_half_precision_keeps_float32_scores():
    q, k, v = (jax.random.normal(key, (2, 9, 4, 8), jnp.bfloat16) for key in jax.random.split(jax.random.key(1), 3))
    made = attend_step(q[:, :1], k, v)
    assert made.dtype == jnp.bfloat16
    expected = jax.nn.dot_product_attention(q[:, :1], k, v)
    np.testing.assert_allclose(made.astype(jnp.float32), expected.astype(jnp.float32), atol=1e-2)


def test_a_query_that_may_see_nothing_stays_finite():
    q, k = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 3, 2, 4))
    assert np.isfinite(attend_step(q, k, k, mask=jnp.zeros((1, 1, 1, 3), bool))).all()
