"""Rules of what is seen, and the implementations that apply them: blocks, the kernel for TPUs, cuDNN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jpeft
from jpeft.models.attention import Attention, splash
from jpeft.models.attention.cudnn import cudnn_takes, needs_no_array
from jpeft.models.attention.splash import expressible
from jpeft.visible import Visible
from tests.models.attention.test_attention import heads, plain

RULES = {
    "none": (300, 300, Visible),
    "causal": (300, 300, lambda: Visible(causal=True)),
    "window": (300, 300, lambda: Visible(causal=True, window=40)),
    "padding": (300, 300, lambda: Visible(causal=True, real=REAL)),
    "segments": (300, 300, lambda: Visible(causal=True, segments=SEGMENTS, real=REAL)),
    "prefix": (300, 305, lambda: Visible(causal=True).behind(5)),
    "prefix, window, padding": (300, 305, lambda: Visible(causal=True, window=40, real=REAL, prefix=5)),
    "prefix, segments": (300, 305, lambda: Visible(causal=True, segments=SEGMENTS, prefix=5)),
    "sliding layer": (300, 300, lambda: Visible(causal=True, window=40, real=REAL, slides=jnp.asarray(True))),
    "layer that does not slide": (300, 300, lambda: Visible(causal=True, window=40, slides=jnp.asarray(False))),
    "cache": (300, 400, lambda: Visible(causal=True, first=jnp.asarray(60))),
    "another text": (300, 200, lambda: Visible(real=REAL[:, :200])),
}
REAL = jnp.asarray(np.arange(300)[None] >= np.array([[0], [30]]))
SEGMENTS = jnp.asarray(np.stack([np.arange(300) // 128, np.arange(300) // 77]), jnp.int32)


def by_hand(rules, queries, keys):
    """The mask [B, 1, T, S], entry by entry as the docstring of `Visible` has it."""
    rows = 1 if rules.real is None and rules.segments is None else 2
    seen = np.zeros((rows, 1, queries, keys), bool)
    first = 0 if rules.first is None else int(rules.first)
    window = rules.window if rules.window is not None and (rules.slides is None or bool(rules.slides)) else 10**6
    real, segments = (None if x is None else np.asarray(x) for x in (rules.real, rules.segments))
    for row, _, t, s in np.ndindex(*seen.shape):
        slot, own = s - rules.prefix, first + t
        if slot < 0:
            seen[row, 0, t, s] = True
            continue
        ordered = not rules.causal or own - window < slot <= own
        alike = segments is None or segments[row, t] == segments[row, slot]
        seen[row, 0, t, s] = ordered and alike and (real is None or real[row, slot])
    return seen


@pytest.mark.parametrize("name", RULES)
def test_rules_as_an_array(name):
    queries, keys, make = RULES[name]
    rules = make()
    whole = by_hand(rules, queries, keys)
    np.testing.assert_array_equal(rules.array(queries, keys), whole)
    part = jax.jit(lambda start: rules.array(20, keys, start))(290)  # ten of them are not there
    np.testing.assert_array_equal(part[:, :, :10], whole[:, :, 290:])


@pytest.fixture
def on_tpu(monkeypatch):
    """The kernel for TPUs, interpreted."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    monkeypatch.setattr(kernels, "make_splash_mha", functools.partial(kernels.make_splash_mha, interpret=True))
    monkeypatch.setattr(Attention, "platform", "tpu")
    splash._kernel.cache_clear()
    yield
    splash._kernel.cache_clear()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("implementation", ["blocks", "pallas"])
def test_implementations_agree_with_their_gradients(implementation, name, request):
    queries, keys, make = RULES[name]
    rules = make()
    q, k, v = heads(queries, keys, width=16)
    real = jnp.ones((2, queries)) if rules.real is None or queries > rules.real.shape[1] else rules.real  # padding: any
    if implementation == "pallas":
        assert expressible(queries, keys, rules) == (name not in ("prefix, segments", "cache"))
        request.getfixturevalue("on_tpu")

    def run(attend):
        def value(q, k, v):
            out = attend(q, k, v) * real[:, :, None, None]
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)

    ours = jax.jit(run(lambda q, k, v: Attention(implementation)(q, k, v, mask=rules, scale=0.3)))(q, k, v)
    mask = by_hand(rules, queries, keys)
    theirs = jax.jit(run(lambda q, k, v: plain(q, k, v, mask, scale=0.3)))(q, k, v)
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=1e-4)


def test_blocks_with_arrays_and_a_bias():
    q, k, v = heads(300, 300)
    random = np.random.RandomState(1)
    mask = (random.uniform(size=(2, 1, 300, 300)) < 0.7) | np.eye(300, dtype=bool)
    bias = jnp.asarray(random.normal(size=(1, 6, 300, 300)), jnp.float32)
    blocks = Attention("blocks")
    np.testing.assert_allclose(blocks(q, k, v, mask=mask, bias=bias), plain(q, k, v, mask, bias), rtol=1e-4, atol=1e-5)
    both = mask & np.tri(300, dtype=bool)
    np.testing.assert_allclose(blocks(q, k, v, mask=mask, is_causal=True), plain(q, k, v, both), rtol=1e-4, atol=1e-5)
    real = np.asarray(REAL)[:, None, None, :]
    np.testing.assert_allclose(blocks(q, k, v, mask=real), plain(q, k, v, real), rtol=1e-4, atol=1e-5)


def test_memory_of_blocks_is_linear_in_the_length():
    def temporaries(tokens):
        q, k, v = (jax.ShapeDtypeStruct((1, tokens, count, 16), jnp.float32) for count in (2, 1, 1))
        rules = Visible(causal=True, window=100, real=jnp.ones((1, tokens), bool))
        attend = jax.grad(lambda q, k, v: Attention("blocks")(q, k, v, mask=rules).sum(), argnums=(0, 1, 2))
        return jax.jit(attend).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.2 * temporaries(4096)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["window, padding", "sliding layer", "prefix"])
def test_the_kernel_on_a_mesh_equals_one_device(name, axes, on_tpu):
    mesh = jpeft.make_mesh(**axes)
    at = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    rules = {
        "window, padding": Visible(causal=True, window=40, real=jnp.concatenate([REAL, REAL])),
        "sliding layer": Visible(causal=True, window=40, slides=jnp.asarray(False)),
        "prefix": Visible(causal=True, prefix=5),
    }[name]
    q, k, v = (jnp.concatenate([x, -x]) for x in heads(300, 305 if name == "prefix" else 300, width=16))

    def run(attention):
        def value(q, k, v):
            out = attention(q, k, v, mask=rules)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        return jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))

    alone = run(Attention("pallas"))(q, k, v)
    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    spread = run(Attention("pallas", at))(*jax.device_put((q, k, v), cut))
    for found, wanted in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert spread[1].sharding.shard_shape(spread[1].shape)[1:] == (300 // axes.get("context", 1), 3, 16)


def test_rows_that_a_mesh_does_not_divide_are_attended_to_whole(on_tpu):
    mesh = jpeft.make_mesh(data=2, context=4)
    at = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    q, k, v = (jnp.concatenate([x, x])[:3, :299] for x in heads(300, 300, width=16))
    np.testing.assert_allclose(jax.jit(Attention("pallas", at))(q, k, v), plain(q, k, v), atol=1e-5)


def test_where_cudnn_has_words_of_its_own():
    known = {name: needs_no_array(queries, keys, make()) for name, (queries, keys, make) in RULES.items()}
    assert {name for name, alone in known.items() if alone} == {"none", "causal", "window", "prefix"}
    assert not needs_no_array(3, 5, None)
    q = jnp.ones((1, 64, 2, 16), jnp.bfloat16)
    no_gpu = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    assert not cudnn_takes(no_gpu, q, q, q)


@pytest.mark.parametrize(
    "name", ["none", "causal", "window", "padding", "segments", "prefix", "prefix, window, padding"]
)
def test_what_is_asked_of_cudnn(name, monkeypatch):
    """The call, with XLA in cuDNN's place: no machine of the tests has a GPU."""
    queries, keys, make = RULES[name]
    rules, real = make(), jax.nn.dot_product_attention
    q, k, v = heads(queries, keys, jnp.bfloat16)

    def pretend(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        assert not (needs_no_array(queries, keys, rules) and kwargs.get("mask") is not None)
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", pretend)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    out = Attention()(q, k, v, mask=rules)
    wanted = plain(*(x.astype(jnp.float32) for x in (q, k, v)), by_hand(rules, queries, keys))
    rows = REAL if rules.real is not None else jnp.ones((2, queries), bool)
    np.testing.assert_allclose(np.asarray(out, np.float32)[rows], np.asarray(wanted)[rows], atol=4e-2)
