"""Prefix tuning: what its variables are, how it starts, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.virtual_tokens import most_positions, position_offset
from tests import zoo

P = 4


@functools.cache
def base(name: str) -> Any:
    return zoo.MODELS[name].make("float32")


def test_keys_and_values_of_each_layer_and_place() -> None:
    direct = jpeft.PTuningV2(num_virtual_tokens=P)
    adapter = jpeft.partition(direct(base("llama"), rngs=0)).adapter
    at = "layers/self_attn/attention_fn/p_tuning_v2"
    assert {key: value.shape for key, value in adapter.items()} == {
        f"{at}/keys": (3, P, 2, 6),  # [layers, P, key-value heads, head width]
        f"{at}/values": (3, P, 2, 6),
    }
    some = jpeft.partition(jpeft.PTuningV2(num_virtual_tokens=P, layers=[1])(base("llama"), rngs=0)).adapter
    assert jnp.array_equal(some[f"{at}/keys"][0], adapter[f"{at}/keys"][1])

    t5 = jpeft.partition(direct(base("t5"), rngs=0)).adapter
    places = ("encoder/block/layer/0/SelfAttention", "decoder/block/layer/0/SelfAttention")
    assert {key.removesuffix("/attention_fn/p_tuning_v2/keys") for key in t5 if key.endswith("keys")} == {
        *places,
        "decoder/block/layer/1/EncDecAttention",
    }


def test_p_tuning_v2_labels_the_tokens_of_a_sequence() -> None:
    """Prefix and a new head learn tags together; padding is not looked at."""
    config = zoo.FAMILIES["bert-mean-classifier"][0]
    tagger = jpeft.models.from_config(config, task="token-classification", num_labels=4, rngs=nnx.Rngs(0))
    model = jpeft.PTuningV2(num_virtual_tokens=P)(tagger, rngs=0)
    parts = jpeft.partition(model)
    assert {label for label in jpeft.param_labels(model).values() if label != "frozen"} == {"prompt", "head"}
    ids = zoo.ids()
    mask, tags = jnp.ones_like(ids).at[1, 4:].set(0), ids % 4

    @jax.jit
    def step(adapter: Any, state: Any, ids: jax.Array) -> Any:
        def loss(adapter: Any) -> tuple[jax.Array, jax.Array]:
            logits = jpeft.combine(parts.graphdef, adapter, *parts[2:])(ids, attention_mask=mask)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tags)
            return jnp.sum(losses * mask) / jnp.sum(mask), logits

        (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(adapter, updates), state, logits, gradient

    tx = optax.adam(3e-2)
    adapter, state = parts.adapter, tx.init(parts.adapter)
    right = []
    for _ in range(60):
        adapter, state, logits, gradient = step(adapter, state, ids)
        assert logits.shape == (*ids.shape, 4)
        right.append(int(jnp.sum((jnp.argmax(logits, -1) == tags) * mask)))
    assert all(jnp.any(value != 0) for value in gradient.values())
    assert right[0] < right[-1] == int(jnp.sum(mask))
    padded = step(adapter, state, ids.at[1, 4:].set(0))[2]
    assert zoo.relative(padded * mask[..., None], step(adapter, state, ids)[2] * mask[..., None]) < 1e-6


@pytest.mark.parametrize("name", ["llama", "mistral-remat", "gpt2", "t5"])
def test_from_text_starts_behind_that_text(name: str) -> None:
    text = (5, 9, 2, 7)
    method = jpeft.PTuningV2(num_virtual_tokens=P, init="text", text_ids=text)
    adapted, ids = method(base(name), rngs=0), zoo.ids()
    before = jnp.concatenate([jnp.broadcast_to(jnp.array(text), (len(ids), P)), ids], axis=1)
    if name == "t5":
        # Its own keys and values stand before the encoder's: those are the base's behind the text.
        made = adapted.encoder.block.layer.layer[0].SelfAttention.attention_fn.keys[0]
        hidden = base(name).shared(jnp.array(text)[None])
        block = base(name).encoder.block.unstack()[0].layer[0]
        expected = block.SelfAttention.keys_values(block.layer_norm(hidden))[0][0]
        assert zoo.relative(made, expected) < 1e-5
        return
    expected = base(name)(before)[:, P:]
    if name == "mistral-remat":  # the window slides past a text, never past a prefix: the first tokens see all of both
        assert zoo.relative(adapted(ids)[:, :1], expected[:, :1]) > 1e-3
        return
    assert zoo.relative(adapted(ids), expected) < 1e-5


def test_text_is_repeated_or_cut() -> None:
    def keys(text: tuple[int, ...]) -> jax.Array:
        method = jpeft.PTuningV2(num_virtual_tokens=P, init="text", text_ids=text)
        return method(base("llama"), rngs=0).layers.layer.self_attn.attention_fn.keys.get_value()

    assert jnp.array_equal(keys((5, 9)), keys((5, 9, 5, 9)))
    assert jnp.array_equal(keys((5, 9, 2, 7)), keys((5, 9, 2, 7, 1, 1)))


def test_the_mlp_is_one_for_all_layers_and_bake_drops_it() -> None:
    adapted = jpeft.PrefixTuning(num_virtual_tokens=P, hidden_size=5)(base("llama"), rngs=0)
    parts = jpeft.partition(adapted)
    at = "layers/self_attn/attention_fn/prefix/"
    shapes = {key.removeprefix(at): value.shape for key, value in parts.adapter.items()}
    assert shapes == {
        "embedding": (P, 12),
        "w_in": (12, 5),
        "b_in": (5,),
        "w_out": (3, 5, 2, 2, 6),
        "b_out": (3, 2, 2, 6),
    }
    baked = jpeft.bake(adapted)
    made = jpeft.partition(baked).adapter
    inner = np.tanh(parts.adapter[at + "embedding"] @ parts.adapter[at + "w_in"] + parts.adapter[at + "b_in"])
    for layer in range(3):
        w, b = parts.adapter[at + "w_out"][layer], parts.adapter[at + "b_out"][layer]
        flat = inner @ w.reshape(5, -1) + b.reshape(-1)
        both = flat.reshape(P, 2, 2, 6)
        assert np.allclose(made[at + "keys"][layer], both[:, 0], atol=1e-6)
        assert np.allclose(made[at + "values"][layer], both[:, 1], atol=1e-6)
    assert zoo.relative(baked(zoo.ids()), adapted(zoo.ids())) < 1e-5
    assert jpeft.applied(baked) == (jpeft.PrefixTuning(num_virtual_tokens=P, hidden_size=5, reparameterize=False),)


def test_a_baked_model_is_saved_and_loaded(tmp_path: Any) -> None:
    baked = jpeft.bake(jpeft.PrefixTuning(num_virtual_tokens=P, hidden_size=5)(base("llama"), rngs=0))
    jpeft.save_adapter(tmp_path / "adapter", baked)
    loaded = jpeft.load_adapter(tmp_path / "adapter", base("llama"))
    assert jnp.array_equal(loaded(zoo.ids()), baked(zoo.ids()))


def test_stacked_and_listed_layers_start_alike() -> None:
    for method in (jpeft.PTuningV2(num_virtual_tokens=P), jpeft.PrefixTuning(num_virtual_tokens=P, hidden_size=5)):
        listed = zoo.MODELS["llama"].make("float32")
        listed.layers = nnx.data(listed.layers.unstack())
        ids = zoo.ids()
        assert (
            zoo.relative(jax.jit(lambda m, i: m(i))(method(listed, rngs=0), ids), method(base("llama"), rngs=0)(ids))
            < 1e-5
        )


def test_left_padding_changes_nothing() -> None:
    for name in ("llama", "mistral-remat", "gpt2"):
        adapted = jpeft.PTuningV2(num_virtual_tokens=P, init="normal")(base(name), rngs=0)
        ids = zoo.ids()
        padded = jnp.pad(ids, [(0, 0), (3, 0)])
        mask = jnp.pad(jnp.ones_like(ids), [(0, 0), (3, 0)])
        assert zoo.relative(adapted(padded, mask)[:, 3:], adapted(ids)) < 1e-5


def test_flax_attention_decodes_with_its_cache() -> None:
    model = zoo.MODELS["flax-attention"].make("float32")
    adapted = jpeft.PTuningV2(num_virtual_tokens=P, init="normal", targets="attention")(model, rngs=0).attention
    x = jax.random.normal(jax.random.key(0), (2, 5, zoo.WIDTH))
    whole = adapted(x, is_causal=True, deterministic=True)
    adapted.decode = True
    adapted.init_cache(x.shape)
    steps = [adapted(x[:, at : at + 1], deterministic=True) for at in range(5)]
    assert zoo.relative(jnp.concatenate(steps, axis=1), whole) < 1e-5


def test_several_prefixes_and_lora_compose() -> None:
    both = jpeft.compose(
        jpeft.LoRA(rank=2), jpeft.PTuningV2(num_virtual_tokens=2), jpeft.PTuningV2(num_virtual_tokens=3, name="second")
    )(base("gpt2"), rngs=0)
    assert most_positions(both) == position_offset(both) == 5
    assert jnp.all(jnp.isfinite(both(zoo.ids())))
    with pytest.raises(jpeft.JpeftError, match="behind a prefix of 5"):
        both(jnp.zeros((1, 28), jnp.int32))


@pytest.mark.parametrize(
    ("method", "model", "said"),
    [
        (lambda: jpeft.PrefixTuning(num_virtual_tokens=0), None, "num_virtual_tokens=0"),
        (lambda: jpeft.PrefixTuning(init="text"), None, "belong together"),
        (lambda: jpeft.PTuningV2(init="text", text_ids="some words"), None, "tokenizer.encode"),
        (lambda: jpeft.PrefixTuning(init="zeros"), None, "reparameterize=False"),
        (lambda: jpeft.PTuningV2(targets="mlp"), "llama", "'layers/mlp', a MLP, holds no attention_fn"),
        (jpeft.PTuningV2, "user-list", "give targets="),
        (lambda: jpeft.compose(jpeft.PTuningV2(), jpeft.PTuningV2()), "llama", "another name="),
    ],
)
def test_refusals(method: Any, model: str | None, said: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=said):
        method()(base(model or "llama"), rngs=0)
