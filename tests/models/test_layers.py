"""The shared layers: values and gradients of the custom VJPs against autodiff of the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.errors import JpeftError
from jpeft.models.layers import _FORMULAS, ACTIVATIONS, activation, gated, rms_norm


def formula(x, scale, epsilon):
    return scale * x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)


def arrays(*shapes, dtype=jnp.float32):
    random = np.random.RandomState(0)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("shape", [(9,), (3, 9), (2, 3, 9)])
def test_rms_norm(shape):
    x, scale, weights = arrays(shape, (9,), shape)
    np.testing.assert_allclose(rms_norm(x, scale, 1e-2), formula(x, scale, 1e-2), rtol=1e-5)
    ours, theirs = (
        jax.grad(lambda x, s, f=f: jnp.sum(f(x, s, 1e-2) * weights), (0, 1))(x, scale) for f in (rms_norm, formula)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_rms_norm_computes_half_precision_in_float32():
    x, scale = arrays((4, 64), (64,))
    x = 300 * x  # squares overflow float16
    half = rms_norm(x.astype(jnp.float16), scale.astype(jnp.float16), 1e-6)
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, formula(x, scale, 1e-6), rtol=5e-3, atol=5e-3)
    grads = jax.grad(lambda x: jnp.sum(rms_norm(x, scale.astype(jnp.float16), 1e-6)))(x.astype(jnp.float16))
    assert grads.dtype == jnp.float16
    assert jnp.all(jnp.isfinite(grads))


def test_rms_norm_under_vmap():
    x, scale = arrays((2, 3, 9), (5, 9))
    norms = jax.vmap(lambda s: rms_norm(x, s, 1e-3))(scale)
    np.testing.assert_allclose(norms[4], formula(x, scale[4], 1e-3), rtol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_gates(name):
    gate, up, weights = arrays((4, 9), (4, 9), (4, 9))
    plain = _FORMULAS[name]
    np.testing.assert_allclose(activation(name)(gate), plain(gate), rtol=1e-6)
    np.testing.assert_allclose(gated(name, gate, up), plain(gate) * up, rtol=1e-6)
    ours = jax.grad(lambda g, u: jnp.sum(weights * gated(name, g, u)), (0, 1))(gate, up)
    theirs = jax.grad(lambda g, u: jnp.sum(weights * plain(g) * u), (0, 1))(gate, up)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_the_backward_pass_keeps():
    """The inputs and nothing else: autodiff of SwiGLU would keep the sigmoid and the product as well."""
    gate, up = arrays((64, 64), (64, 64))
    kept = jax.eval_shape(lambda g, u: jax.vjp(lambda g, u: gated("silu", g, u), g, u)[1], gate, up)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) == 2 * 64 * 64


def test_unknown_activation():
    with pytest.raises(JpeftError, match="gelu_new"):
        activation("gelu_neww")


@pytest.mark.parity
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(activation(name)(x), ACT2FN[name](torch.tensor(x)).numpy(), atol=2e-6)
