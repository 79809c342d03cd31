"""The loss in blocks against its plain form, and that logits of the whole batch never exist."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jpeft
import jpeft.models
from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.losses import causal_lm_loss, language_model_loss, token_losses
from jpeft.variables import freeze

B, T, D, V = 3, 17, 8, 29


class Head(nnx.Module):
    """The smallest model the losses take."""

    def __init__(self, vocabulary=V, features=D, bias=True):
        self.lm_head = nnx.Linear(features, vocabulary, use_bias=bias, rngs=nnx.Rngs(0))

    def logits(self, hidden):
        return self.lm_head(hidden)


def data(batch=B, length=T, features=D, vocabulary=V):
    random = np.random.RandomState(0)
    hidden = jnp.asarray(random.normal(size=(batch, length, features)), jnp.float32)
    labels = random.randint(0, vocabulary, (batch, length))
    labels[0, :5] = -100
    labels[2] = -100
    return hidden, jnp.asarray(labels), jnp.asarray(random.uniform(size=(batch, length)), jnp.float32)


def plain(model, hidden, labels):
    each = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), jnp.maximum(labels, 0))
    return jnp.where(labels == -100, 0, each)


def models():
    return {"trained": Head(), "frozen": surgery.map_variables(Head(), freeze)}


@pytest.mark.parametrize("kind", ["trained", "frozen"])
@pytest.mark.parametrize("block", [1, 4, 13, 51, 1000])
def test_equals_the_plain_form(kind, block):
    model = models()[kind]
    hidden, labels, weights = data()
    graphdef, state = nnx.split(model)

    def ours(hidden, state):
        return jnp.sum(weights * token_losses(nnx.merge(graphdef, state), hidden, labels, block=block))

    def reference(hidden, state):
        return jnp.sum(weights * plain(nnx.merge(graphdef, state), hidden, labels))

    np.testing.assert_allclose(
        token_losses(model, hidden, labels, block=block), plain(model, hidden, labels), rtol=1e-5, atol=1e-6
    )
    which = (0, 1) if kind == "trained" else (0,)
    mine, theirs = (jax.jit(jax.grad(f, which))(hidden, state) for f in (ours, reference))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_sum_and_count():
    model = Head()
    hidden, labels, weights = data()
    each = plain(model, hidden, labels)
    total, count = language_model_loss(model, hidden, labels, block=7)
    np.testing.assert_allclose(total, each.sum(), rtol=1e-5)
    assert count == (labels != -100).sum()
    total, count = language_model_loss(model, hidden, labels, weights, block=7)
    np.testing.assert_allclose(total, (each * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(count, (weights * (labels != -100)).sum(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_logits_of_the_batch_are_never_held(kind):
    batch, length, features, vocabulary = 4, 512, 16, 4096
    model = Head(vocabulary, features, bias=False)
    model = surgery.map_variables(model, freeze) if kind == "frozen" else model
    hidden, labels, _ = data(batch, length, features, vocabulary)
    graphdef, state = nnx.split(model)

    def temporaries(loss):
        which = (0, 1) if kind == "trained" else (0,)
        step = jax.jit(jax.grad(lambda h, s: jnp.sum(loss(nnx.merge(graphdef, s), h, labels)), which))
        return step.lower(hidden, state).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * batch * length * vocabulary
    assert temporaries(plain) >= logits
    assert temporaries(lambda *args: token_losses(*args, block=128)) < logits / 4


def test_one_matrix_product_less_with_a_frozen_head():
    hidden, labels, _ = data()
    counts = {}
    for kind, model in models().items():
        graphdef, state = nnx.split(model)
        step = jax.grad(lambda h, s, g=graphdef: jnp.sum(token_losses(nnx.merge(g, s), h, labels)))
        counts[kind] = str(jax.make_jaxpr(step)(hidden, state)).count("dot_general[")
    assert counts["frozen"] == 2  # logits, and the gradient of the hidden states
    assert counts["trained"] > 2


def test_vmap_over_heads_and_half_precision():
    hidden, labels, _ = data()
    graphdef, state = nnx.split(models()["frozen"])
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), state)
    each = jax.vmap(lambda s: token_losses(nnx.merge(graphdef, s), hidden, labels, block=6))(many)
    np.testing.assert_allclose(each[0], plain(Head(), hidden, labels), rtol=1e-5, atol=1e-6)
    half = jax.grad(lambda h: jnp.sum(token_losses(models()["frozen"], h, labels, block=6)))(
        hidden.astype(jnp.bfloat16)
    )
    full = jax.grad(lambda h: jnp.sum(plain(Head(), h, labels)))(hidden)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, full, atol=0.02)


def test_bad_labels_are_not_silent():
    model = Head()
    hidden, labels, _ = data()
    for bad in (V, -1):
        losses = token_losses(model, hidden, labels.at[1, 3].set(bad))
        assert jnp.isnan(losses[1, 3])
        assert jnp.isnan(losses).sum() == 1
    with pytest.raises(JpeftError, match="labels"):
        token_losses(model, hidden, labels[:, :-1])
    with pytest.raises(JpeftError, match="weights"):
        language_model_loss(model, hidden, labels, jnp.ones((B, 1)))
    with pytest.raises(JpeftError, match="block"):
        token_losses(model, hidden, labels, block=0)


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_causal_lm_loss_of_a_model(tied, frozen):
    model = jpeft.models.from_config({**CONFIG, "tie_word_embeddings": tied})
    model = surgery.map_variables(model, freeze) if frozen else model
    ids = np.random.RandomState(0).randint(0, V, (3, 9))
    mask = np.arange(9) >= np.array([[0], [4], [0]])
    logits = model(ids, mask)
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    targets = mask[:, :-1] & mask[:, 1:]
    total, count = causal_lm_loss(model, ids, attention_mask=mask, block=5)
    np.testing.assert_allclose(total, (each * targets).sum(), rtol=1e-5)
    assert count == targets.sum()
    labels = np.where(np.arange(9) < 6, -100, ids)
    total, count = causal_lm_loss(model, ids, attention_mask=mask, labels=labels, block=5)
    np.testing.assert_allclose(total, (each * targets)[:, 5:].sum(), rtol=1e-5)
    assert count == 9


def test_gradient_reaches_the_layers_below_a_frozen_head():
    model = jpeft.models.from_config(CONFIG)
    model.lm_head = surgery.map_variables(model.lm_head, freeze)
    model.embed_tokens = surgery.map_variables(model.embed_tokens, freeze)
    model.norm = surgery.map_variables(model.norm, freeze)
    graphdef, trained, rest = nnx.split(model, nnx.Param, ...)
    ids = jnp.asarray(np.random.RandomState(0).randint(0, V, (2, 9)))

    def blocked(trained):
        return causal_lm_loss(nnx.merge(graphdef, trained, rest), ids, block=4)[0]

    def reference(trained):
        logits = nnx.merge(graphdef, trained, rest)(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).sum()

    mine, theirs = (jax.tree.leaves(jax.jit(jax.grad(f))(trained)) for f in (blocked, reference))
    assert len(mine) == 9
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_gradient_of_adapters(targets):
    base = jpeft.models.from_config(CONFIG)
    model = jpeft.LoRA(rank=2, targets=targets)(base, rngs=nnx.Rngs(0))
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    random = np.random.RandomState(0)
    adapter = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), a.dtype), adapter)
    ids = jnp.asarray(random.randint(0, V, (2, 9)))

    def blocked(adapter):
        return causal_lm_loss(jpeft.combine(graphdef, adapter, buffers, frozen), ids, block=4)[0]

    def reference(adapter):
        logits = jpeft.combine(graphdef, adapter, buffers, frozen)(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).sum()

    mine, theirs = (jax.tree.leaves(jax.jit(jax.grad(f))(adapter)) for f in (blocked, reference))
    assert len(mine) == 2 * len(targets)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_segments_do_not_predict_each_other():
    model = jpeft.models.from_config(CONFIG)
    ids = np.random.RandomState(0).randint(0, V, (1, 9))
    total, count = causal_lm_loss(model, ids, segment_ids=np.array([[1] * 4 + [2] * 5]))
    parts = [causal_lm_loss(model, ids[:, a:b]) for a, b in ((0, 4), (4, 9))]
    np.testing.assert_allclose(total, parts[0][0] + parts[1][0], rtol=1e-5)
    assert count == 7
