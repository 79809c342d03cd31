"""The attention function and its masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.errors import JpeftError
from jpeft.models.attention import Attention
from jpeft.models.attention.masks import causal_mask, padding_mask, token_positions
from jpeft.models.causal import layer_masks
from jpeft.visible import Visible
from tests import zoo


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


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_models_whose_masks_stay_rules(family, monkeypatch):
    """Padding, windows, a prefix, packed texts and a cache, through whole models."""
    monkeypatch.setattr("jpeft.models.attention.blocks.SIZE", 4)
    config, task, further = zoo.FAMILIES[family]
    whole, blocks = (
        jpeft.PTuningV2(num_virtual_tokens=3)(
            jpeft.models.from_config(config, task=task, attention=name, rngs=nnx.Rngs(0), **further), rngs=nnx.Rngs(1)
        )
        for name in ("xla", "blocks")
    )
    given = {"attention_mask": jnp.ones((2, 6), jnp.int32).at[0, :2].set(0)}
    if getattr(whole, "has_decoder", False):
        given |= {"decoder_input_ids": zoo.ids()[:, ::-1]}
    calls = [given] + ([{"segment_ids": jnp.asarray([[0, 0, 0, 1, 1, 1]] * 2)}] if task == "causal-lm" else [])
    for call in calls:
        real = call.get("attention_mask", jnp.ones((2, 6))) if task not in ("sequence-classification",) else None
        ours, theirs = (np.asarray(model(zoo.ids(), **call)) for model in (blocks, whole))
        seen = np.ones(ours.shape[:1], bool) if real is None or "decoder_input_ids" in call else np.asarray(real, bool)
        np.testing.assert_allclose(ours[seen], theirs[seen], rtol=1e-4, atol=1e-5)
    if task == "causal-lm":
        made = [jpeft.generate(model, zoo.ids(), max_new_tokens=4, **given) for model in (whole, blocks)]
        np.testing.assert_array_equal(*(np.asarray(out.tokens if hasattr(out, "tokens") else out) for out in made))


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
    assert Attention() == Attention("auto")
    assert hash(Attention()) == hash(Attention("auto"))


def test_masks():
    assert causal_mask(2, 5, first=2)[0, 0].astype(int).tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert causal_mask(2, 5, first=2, window=2)[0, 0].astype(int).tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert padding_mask(None) is None
    assert padding_mask(jnp.array([[0, 1]])).tolist() == [[[[False, True]]]]
    segments = Visible(segments=jnp.array([[1, 1, 2]])).array(3, 3)
    assert segments[0, 0].astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_positions():
    assert token_positions(None, None, (1, 3)).tolist() == [[0, 1, 2]]
    left = jnp.array([[0, 0, 1, 1]])
    assert token_positions(left, None, left.shape).tolist() == [[0, 0, 0, 1]]
    segments = jnp.array([[0, 0, 1, 1], [1, 1, 1, 7]])
    assert token_positions(None, segments, segments.shape).tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    mask = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert token_positions(mask, segments, segments.shape).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_plain_causal_order_is_left_to_the_attention_function():
    causal = Visible(causal=True)

    def made(window, slides, name="xla"):
        return layer_masks(causal, 5, window, slides, Attention(name), 5)

    assert made(None, (False,)).at(0) is None
    assert made(5, (True, False)).at(0) is None
    mixed = made(2, (True, False))
    np.testing.assert_array_equal(mixed.at(0), causal_mask(5, 5, window=2))
    np.testing.assert_array_equal(mixed.at(1), causal_mask(5, 5))
    np.testing.assert_array_equal(jax.jit(mixed.at)(0), causal_mask(5, 5, window=2))
    rules = made(2, (True, False), "blocks")
    for layer in (0, 1):
        np.testing.assert_array_equal(rules.at(layer).array(5, 5), mixed.at(layer))
        np.testing.assert_array_equal(jax.jit(lambda layer: rules.at(layer).array(5, 5))(layer), mixed.at(layer))
