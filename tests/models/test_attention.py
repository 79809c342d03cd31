"""The attention function and its masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.errors import JpeftError
from jpeft.models.attention import Attention, causal_mask, padding_mask, segment_mask, token_positions
from jpeft.models.causal import layer_masks


def heads(tokens=5, keys=7, dtype=jnp.float32, width=4):
    random = np.random.RandomState(0)
    return [
        jnp.asarray(random.normal(size=(2, length, count, width)), dtype)
        for length, count in ((tokens, 6), (keys, 2), (keys, 2))
    ]


def plain(q, k, v, mask=True, bias=0.0, scale=None):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask, scores, -1e30), -1), v)


def test_grouped_heads_with_mask_bias_and_scale():
    q, k, v = heads()
    random = np.random.RandomState(1)
    mask, bias = random.uniform(size=(2, 1, 5, 7)) < 0.7, jnp.asarray(random.normal(size=(1, 6, 5, 7)), jnp.float32)
    mask[..., 0] = True
    np.testing.assert_allclose(Attention()(q, k, v), plain(q, k, v), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        Attention()(q, k, v, mask=mask, bias=bias, scale=0.3), plain(q, k, v, mask, bias, 0.3), rtol=1e-5, atol=1e-6
    )


def test_causal_order():
    q, k, v = heads(7)
    np.testing.assert_allclose(
        Attention()(q, k, v, is_causal=True), plain(q, k, v, causal_mask(7, 7)), rtol=1e-5, atol=1e-6
    )


def test_float16_on_cpu():
    q, k, v = heads(dtype=jnp.float16)
    out = Attention()(q, k, v)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, plain(*(x.astype(jnp.float32) for x in (q, k, v))), atol=2e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_for_tpus(masked, monkeypatch):
    from jax.experimental.pallas import tpu

    q, k, v = heads(128, 128, width=16)
    mask = (np.random.RandomState(1).uniform(size=(2, 1, 128, 128)) < 0.7) | np.eye(128, dtype=bool) if masked else None
    bias = jnp.asarray(np.random.RandomState(2).normal(size=(1, 6, 128, 128)), jnp.float32) if masked else None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with tpu.force_tpu_interpret_mode():
        ours = Attention("pallas")(q, k, v, mask=mask, bias=bias, is_causal=not masked)
    theirs = plain(q, k, v, mask, bias) if masked else plain(q, k, v, causal_mask(128, 128))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    q, k, v = heads()
    np.testing.assert_allclose(Attention("pallas")(q, k, v), plain(q, k, v), atol=1e-5)


def test_refusals(monkeypatch):
    q, k, v = heads()
    with pytest.raises(JpeftError, match=r"xla.*cudnn.*pallas"):
        Attention("flash")
    for name, needed in (("cudnn", "GPU"), ("pallas", "TPU")):
        with pytest.raises(JpeftError, match=needed):
            Attention(name)(q, k, v)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(JpeftError, match="bfloat16"):
        Attention("cudnn")(q, k, v)


def test_a_value():
    assert Attention() == Attention("xla")
    assert hash(Attention()) == hash(Attention("xla"))


def test_masks():
    assert causal_mask(2, 5, first=2)[0, 0].astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert causal_mask(2, 5, first=2, window=2)[0, 0].astype(int).tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert padding_mask(None) is None
    assert padding_mask(jnp.array([[0, 1]])).tolist() == [[[[False, True]]]]
    assert segment_mask(jnp.array([[1, 1, 2]]))[0, 0].astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_positions():
    assert token_positions(None, None, (1, 3)).tolist() == [[0, 1, 2]]
    left = jnp.array([[0, 0, 1, 1]])
    assert token_positions(left, None, left.shape).tolist() == [[0, 0, 0, 1]]
    segments = jnp.array([[0, 0, 1, 1], [1, 1, 1, 7]])
    assert token_positions(None, segments, segments.shape).tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    mask = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert token_positions(mask, segments, segments.shape).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_plain_causal_order_is_left_to_the_attention_function():
    assert layer_masks((2, 5), None, None, None, (False,)).at(0) is None
    assert layer_masks((2, 5), None, None, 5, (True, False)).at(0) is None
    mixed = layer_masks((2, 5), None, None, 2, (True, False))
    np.testing.assert_array_equal(mixed.at(0), causal_mask(5, 5, window=2))
    np.testing.assert_array_equal(mixed.at(1), causal_mask(5, 5))
    np.testing.assert_array_equal(jax.jit(mixed.at)(0), causal_mask(5, 5, window=2))
