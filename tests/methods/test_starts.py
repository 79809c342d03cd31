"""Low-rank updates that start from what quantisation loses, and from the data."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from tests import zoo

FORM = jpeft.NF4(block_size=4)


@functools.cache
def base() -> Any:
    return zoo.UserModel(nnx.Rngs(0), stacked=True)


def effective(model: Any) -> dict[str, jax.Array]:
    """The weights that a model stands for, its update included."""
    return jpeft.partition(jpeft.merge(model, dequantize=True)).frozen


def distance(model: Any, name: str, layer: int) -> float:
    key = f"layers/{name}/kernel"
    return float(jnp.linalg.norm(effective(model)[key][layer] - effective(base())[key][layer]))


def test_loftq_makes_up_for_what_quantisation_loses(tmp_path: Any) -> None:
    method = jpeft.LoRAPlus(rank=3, alpha=7.0, targets=["up"], layers=[0, 2], rank_pattern={"layers.2": 1})
    small = FORM(base())
    once, often = (jpeft.loftq(base(), method, FORM, iterations=n, rngs=0) for n in (1, 5))
    # Eckart and Young: the best of the rank is what is left of the singular values.
    lost = effective(base())["layers/up/kernel"] - effective(small)["layers/up/kernel"]
    values = jnp.linalg.svd(lost, compute_uv=False)
    for layer, rank in ((0, 3), (1, 0), (2, 1)):
        assert np.isclose(distance(once, "up", layer), jnp.linalg.norm(values[layer, rank:]), rtol=1e-4)
    assert distance(often, "up", 0) < distance(once, "up", 0)
    assert distance(often, "up", 1) == distance(small, "up", 1)  # not adapted
    assert distance(once, "down", 0) == distance(small, "down", 0) > 0

    # One iteration leaves the codes alone: the adapter is one of any model quantised so, and of one read from a file.
    frozen, plain = jpeft.partition(once).frozen, jpeft.partition(small).frozen
    assert all(jnp.array_equal(frozen[key], value) for key, value in plain.items())
    given = jpeft.partition(jpeft.loftq(base(), method, small, rngs=0)).adapter
    assert all(jnp.array_equal(given[key], value) for key, value in jpeft.partition(once).adapter.items())
    jpeft.save_adapter(tmp_path / "adapter", once)
    loaded = jpeft.load_adapter(tmp_path / "adapter", small)
    assert jnp.array_equal(loaded(zoo.ids()), once(zoo.ids()))


def test_loftq_in_bfloat16_starts_from_what_is_multiplied() -> None:
    low = zoo.UserModel(nnx.Rngs(0), jnp.bfloat16, stacked=True)
    made = jpeft.loftq(low, jpeft.LoRA(rank=2, targets="down"), FORM, iterations=2, rngs=0)
    parts = jpeft.partition(made)
    assert parts.adapter["layers/down/lora/a"].dtype == jnp.float32
    quantized = jpeft.partition(jpeft.merge(jpeft.strip(made), dequantize=True)).frozen["layers/down/kernel"]
    assert quantized.dtype == jnp.bfloat16
    lost = jpeft.partition(low).frozen["layers/down/kernel"].astype(jnp.float32) - quantized.astype(jnp.float32)
    update = parts.adapter["layers/down/lora/a"] @ parts.adapter["layers/down/lora/b"]
    values = jnp.linalg.svd(lost, compute_uv=False)
    assert np.allclose(jnp.linalg.norm(lost - update, axis=(1, 2)), jnp.linalg.norm(values[:, 2:], axis=1), rtol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weight_take_a_quantised_one_as_it_is_multiplied(init: str) -> None:
    small = FORM(base())
    made = jpeft.LoRA(rank=2, alpha=4.0, init=init, targets="up")(small, rngs=0)
    assert zoo.relative(made(zoo.ids()), small(zoo.ids())) < 1e-5
    parts = jpeft.partition(made)
    update = 2 * parts.adapter["layers/up/lora/a"] @ parts.adapter["layers/up/lora/b"]
    if init == "pissa":
        weight = effective(small)["layers/up/kernel"]
        values = jnp.linalg.svd(weight, compute_uv=False)
        left = jnp.linalg.norm(weight - update, axis=(1, 2))
        assert np.allclose(left, jnp.linalg.norm(values[:, 2:], axis=1), rtol=1e-4)
    moved = jpeft.combine(parts.graphdef, zoo.trained(parts), *parts[2:])
    assert zoo.relative(jpeft.merge(moved, dequantize=True)(zoo.ids()), moved(zoo.ids())) < 1e-5


def test_an_update_from_the_weight_and_a_plain_one_share_a_base(tmp_path: Any) -> None:
    """In both orders, switched, and in one batch, where the first is what its file says: a plain update."""
    model, ids = zoo.MODELS["llama"].make("float32"), zoo.ids()
    untouched = {key: jnp.array(value) for key, value in jpeft.partition(model).frozen.items()}
    pissa = jpeft.LoRA(rank=2, init="pissa", targets=["q_proj", "up_proj"], name="pissa")
    plain = jpeft.LoRA(rank=4, targets=["q_proj", "up_proj"])

    def trained(method: jpeft.Method) -> Any:
        parts = jpeft.partition(method(model, rngs=0))
        return jpeft.combine(parts.graphdef, {k: v + 0.05 for k, v in parts.adapter.items()}, *parts[2:])

    one, other = trained(pissa), trained(plain)
    first, second = trained(jpeft.compose(pissa, plain)), trained(jpeft.compose(plain, pissa))
    assert zoo.relative(first(ids), second(ids)) < 1e-5
    assert zoo.relative(first(ids), one(ids)) > 1e-3
    assert zoo.relative(jpeft.merge(first)(ids), first(ids)) < 1e-5

    as_plain = jpeft.load_peft(model, jpeft.save_peft(one, tmp_path / "pissa"))
    assert zoo.relative(as_plain(ids), one(ids)) < 1e-5
    parts = jpeft.partition(other)
    arrays = [jpeft.partition(each)[1:3] for each in (as_plain, other)]
    for adapter, buffers in arrays:
        _, state, kept, frozen = parts
        switched = jpeft.combine(parts.graphdef, {k: adapter[k] for k in state}, {k: buffers[k] for k in kept}, frozen)
        assert zoo.relative(switched(ids), (one if adapter is arrays[0][0] else other)(ids)) < 1e-5
    served = jpeft.partition(jpeft.multi(other, arrays))
    rows = jpeft.combine(*served, adapter_ids=jnp.array([1, 0]))(ids)
    assert zoo.relative(rows, jnp.stack([other(ids)[0], one(ids)[1]])) < 1e-5
    assert all(bool(jnp.array_equal(jpeft.partition(model).frozen[key], value)) for key, value in untouched.items())


def test_eva_starts_from_the_inputs_of_each_layer() -> None:
    """Components over two batches, one with padding, are those of all their tokens at once; ranks move."""
    model, rank = zoo.MODELS["llama"].make("float32"), 3
    ids = [jax.random.randint(jax.random.key(n), (4, 6), 0, zoo.VOCABULARY) for n in (1, 2)]
    masks = [jnp.ones((4, 6), jnp.int32), jnp.ones((4, 6), jnp.int32).at[1, 4:].set(0)]
    batches = [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, masks, strict=True)]
    method = jpeft.LoRA(rank=rank, targets=["q_proj", "v_proj", "down_proj"], rank_pattern={"layers.1.mlp": 0})
    made = jpeft.eva(model, method, batches, rho=2, whiten=True, rngs=0)
    assert jnp.array_equal(made(ids[0]), model(ids[0]))
    (recorded,) = jpeft.applied(made)
    ranks = {name.strip("^$").replace("\\", ""): rank for name, rank in recorded.rank_pattern.items()}
    assert ranks.pop("layers.1.mlp.down_proj") == 0
    assert sum(ranks.values()) == rank * 8
    assert max(ranks.values()) > rank > min(ranks.values())
    alphas = {name.strip("^$").replace("\\", ""): alpha for name, alpha in recorded.alpha_pattern.items()}
    assert alphas == {name: float(rank) for name, rank in ranks.items()}

    # The first layer's attention sees the normalised embeddings of the tokens that are no padding.
    tokens = jnp.concatenate([i[m > 0] for i, m in zip(ids, masks, strict=True)])
    x = model.layers.at(0).input_layernorm(model.embed_tokens(tokens))
    _, values, components = jnp.linalg.svd(x - jnp.mean(x, 0), full_matrices=False)
    adapter = jpeft.partition(made).adapter
    for name in ("q_proj", "v_proj"):
        own = ranks[f"layers.0.self_attn.{name}"]
        a = adapter[f"layers/self_attn/{name}/lora/a"][0]
        assert not jnp.any(a[:, own:])
        expected = components[:own] / jnp.sqrt(values[:own])[:, None]
        signs = jnp.sign(jnp.sum(a.T[:own] * expected, axis=1))
        # What the first batch left out of its components is lost to the second: close, not equal.
        assert jnp.abs(a.T[: own - 1] - (signs[:, None] * expected)[: own - 1]).max() < 0.1 * jnp.abs(expected).max()
    same = jpeft.eva(model, method, [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)], rho=1, rngs=0)
    a = jpeft.partition(same).adapter["layers/self_attn/q_proj/lora/a"][0]
    assert jpeft.applied(same)[0].rank_pattern == {
        **dict.fromkeys(recorded.rank_pattern, rank),
        **{name: 0 for name, own in recorded.rank_pattern.items() if own == 0},
    }
    assert np.allclose(jnp.abs(jnp.sum(a.T * components[:rank], axis=1)), 1, atol=1e-3)


REFUSED = {
    "a LoRA that was given nothing": (
        lambda: jpeft.LoRA(init="loftq")(base(), rngs=0),
        r"init='loftq' needs the weights before quantisation: jpeft\.loftq\(",
    ),
    "no data": (lambda: jpeft.LoRA(init="eva")(base(), rngs=0), r"init='eva' needs batches of data: jpeft\.eva\("),
    "quantised already": (
        lambda: jpeft.loftq(FORM(base()), jpeft.LoRA(), FORM, rngs=0),
        "'layers/down' is quantised already, so what quantisation lost is unknown",
    ),
    "another method": (
        lambda: jpeft.loftq(base(), jpeft.DoRA(), FORM, rngs=0),
        "starts a LoRA, LoRAPlus or LoRAFA, not a DoRA",
    ),
    "another start": (lambda: jpeft.loftq(base(), jpeft.LoRA(init="pissa"), FORM, rngs=0), "init='pissa'"),
    "codes that would change": (
        lambda: jpeft.loftq(base(), jpeft.LoRA(), FORM(base()), iterations=2, rngs=0),
        "iterations=2 would change the codes",
    ),
    "nothing in common": (
        lambda: jpeft.loftq(base(), jpeft.LoRA(targets="embed"), FORM, rngs=0),
        "no layer is both adapted and quantised",
    ),
    "a rank above the weight's": (
        lambda: jpeft.loftq(base(), jpeft.LoRA(rank=13, targets="up"), FORM, rngs=0),
        r"rank=13: .*'layers/up'",
    ),
    "few tokens": (
        lambda: jpeft.eva(base(), jpeft.LoRA(rank=2, targets="up"), [zoo.ids()[:1, :3]], rngs=0),
        r"3 tokens cannot tell 4 components .* 'layers\.0\.up'",
    ),
    "no batches": (lambda: jpeft.eva(base(), jpeft.LoRA(targets="up"), [], rngs=0), "0 tokens"),
    "an embedding": (lambda: jpeft.eva(base(), jpeft.LoRA(targets="embed"), [zoo.ids()], rngs=0), "'embed' is a Embed"),
    "a rho below 1": (lambda: jpeft.eva(base(), jpeft.LoRA(), [zoo.ids()], rho=0.5, rngs=0), "rho=0.5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(jpeft.JpeftError, match=message):
        make()
