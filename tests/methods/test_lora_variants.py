"""What LoRA's relatives do differently: learning rates, fixed factors, starts, lengths, budgets, rescaling."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from tests import zoo


@functools.cache
def base(name: str) -> Any:
    return zoo.MODELS[name].make("float32")


def test_lora_plus_moves_b_faster() -> None:
    model = jpeft.LoRAPlus(rank=2, ratio=8)(base("user-list"), rngs=0)
    adapter = jpeft.partition(model).adapter
    gradient = jax.tree.map(jnp.ones_like, adapter)

    def moved(tx: Any) -> Any:
        return tx.update(gradient, tx.init(adapter), adapter)[0]

    plain, plus = moved(optax.adam(0.1)), moved(jpeft.optimizer(model, optax.adam(0.1)))
    for key in adapter:
        assert np.allclose(plus[key], plain[key] * (8 if key.endswith("/b") else 1)), key


def test_lora_fa_keeps_the_projection_and_not_the_input() -> None:
    """Of the layers' inputs, the backward pass needs those the base's own gradient needs, and no copy for A."""
    ids = zoo.ids()

    def kept(method: jpeft.Method) -> tuple[list[str], int]:
        parts = jpeft.partition(method(base("user-list"), rngs=0))

        def loss(adapter: Any) -> jax.Array:
            return jnp.sum(jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)(ids) ** 2)

        residuals = jax.vjp(loss, parts.adapter)[1]
        return list(parts.adapter), sum(leaf.size for leaf in jax.tree.leaves(residuals))

    (trained, fixed), (all_of_them, plain) = kept(jpeft.LoRAFA(rank=2)), kept(jpeft.LoRA(rank=2))
    assert {key.rsplit("/", 1)[1] for key in trained} == {"b"}
    assert len(all_of_them) == 2 * len(trained)
    # One input [B, T, in] less per adapted layer.
    inputs = zoo.BATCH * zoo.TIME * 3 * (zoo.WIDTH + 20)
    assert plain - fixed >= inputs


def test_an_orthogonal_start_is_no_update_and_has_two_live_factors() -> None:
    adapter = jpeft.partition(jpeft.LoRA(rank=4, init="orthogonal")(base("llama"), rngs=0)).adapter
    a, b = (adapter[f"layers/mlp/up_proj/lora/{name}"] for name in "ab")
    assert jnp.abs(a @ b).max() < 1e-7 * jnp.abs(a).max() * jnp.abs(b).max() * 100
    assert jnp.abs(a).min() > 0
    assert jnp.abs(b).min() > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: jpeft.LoRA(rank=3, init="orthogonal"), "even ranks, found 3"),
        (lambda: jpeft.LoRA(rank=2, init="orthogonal", rank_pattern={"up": 5}), "even ranks, found 5"),
        (lambda: jpeft.LoRA(alpha=-1, init="pissa"), "alpha above 0, found -1"),
        (lambda: jpeft.LoRA(init="svd"), "init='svd'; choose 'kaiming', .*'olora'"),
        (lambda: jpeft.LoRA(rank=13, init="pissa")(base("user-list"), rngs=0), r"13 is more than the 12 .*'layers"),
        (lambda: jpeft.LoRA(rank=2, init="olora", targets="window")(base("shapes"), rngs=0), "not of a Conv"),
        (lambda: jpeft.LoRAFA(targets="embed")(base("user-list"), rngs=0), "Embed"),
        (lambda: jpeft.LoRAPlus(ratio=float("nan")), "ratio=nan is not a finite number"),
        (lambda: jpeft.DoRA(targets="window")(base("shapes"), rngs=0), "Conv"),
        (
            lambda: jpeft.compose(jpeft.LoRA(), jpeft.DoRA())(base("user-list"), rngs=0),
            r"cannot stand around another adapter \('lora'\); apply DoRA first",
        ),
        (lambda: jpeft.AdaLoRA(rank=9, initial_rank=4), "rank=9 is more than initial_rank=4"),
        (lambda: jpeft.AdaLoRA(total_steps=10, warmup_steps=6, final_steps=4), "leave none of total_steps=10"),
        (lambda: jpeft.optimizer(jpeft.AdaLoRA()(base("user-list"), rngs=0), optax.sgd(1)), "total_steps is not set"),
        (lambda: jpeft.IA3()(base("user-list"), rngs=0), "does not declare its 'key' modules; give targets="),
        (lambda: jpeft.IA3(targets="embed")(base("user-list"), rngs=0), "Embed"),
    ],
)
def test_refused(make: Any, said: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=said):
        make()


def test_dora_drops_the_update_and_the_gain_but_not_the_base() -> None:
    parts = jpeft.partition(jpeft.DoRA(rank=2, dropout=0.5, targets="up")(base("user-list"), rngs=0))
    x = jax.random.normal(jax.random.key(0), (4, zoo.WIDTH))
    # At the start the gain is one and the update zero, whatever is dropped.
    noisy = jpeft.combine(*parts, dropout=jax.random.key(1)).layers[0].up
    assert np.allclose(noisy(x), base("user-list").layers[0].up(x), atol=1e-6)
    trained = (
        jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen, dropout=jax.random.key(1))
        .layers[0]
        .up
    )
    kernel, bias = trained.base.kernel[...], trained.base.bias[...]
    dropped = trained.dropout(x)
    gain = trained.m[...] / jnp.linalg.norm(kernel + trained.a[...] @ trained.b[...], axis=0)
    expected = x @ kernel + bias + dropped @ ((gain - 1) * kernel + gain * (trained.a[...] @ trained.b[...]))
    assert zoo.relative(trained(x), expected) < 1e-5


def test_adalora_prunes_to_its_budget_over_all_layers_together(tmp_path: Any) -> None:
    method = jpeft.AdaLoRA(rank=1, initial_rank=3, total_steps=10, warmup_steps=2, final_steps=2, targets="all-linear")
    assert [float(method.budget(step)) for step in (0, 2, 5, 8, 10)] == [3, 3, 1.25, 1, 1]
    model = method(base("llama"), rngs=0)
    parts = jpeft.partition(model)
    tx = jpeft.optimizer(model, optax.adam(1e-2))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(adapter: Any, state: Any, number: Any) -> Any:
        gradient = zoo.trained(parts, number)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    adapter, state, counts = parts.adapter, tx.init(parts.adapter), []
    matrices = sum(v.shape[0] for k, v in adapter.items() if k.endswith("/e"))
    for number in range(10):
        adapter, state = step(adapter, state, number)
        counts.append(sum(int(jnp.sum(v != 0)) for k, v in adapter.items() if k.endswith("/e")))
    assert counts[1] == 3 * matrices
    assert counts[-3:] == [matrices] * 3
    assert counts == sorted(counts, reverse=True)
    kept = jpeft.adalora_ranks(jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen))
    assert sum(int(v.sum()) for v in kept.values()) == matrices
    assert len({int(r) for v in kept.values() for r in v}) > 1  # not the same for all

    # A loop that forgot the allocator is told so when it saves; the one above is not.
    jpeft.save_adapter(tmp_path / "pruned", jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen))
    forgot = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    said = "AdaLoRA: every matrix still has all 3 singular values"
    with pytest.warns(UserWarning, match=f"save_adapter: {said}"):
        jpeft.save_adapter(tmp_path / "adapter", forgot)
    with pytest.warns(UserWarning, match=f"save_peft: {said}"):
        jpeft.save_peft(forgot, tmp_path / "peft")


def test_ia3_predicates_are_recorded_by_name() -> None:
    method = jpeft.IA3(targets=lambda name, module: name.endswith("up"), feed_forward="down", layers=[1])
    recorded = jpeft.applied(method(base("user-stack-remat"), rngs=0))[0]
    assert recorded.targets == (r"^layers\.1\.up$",)
    assert recorded.feed_forward == (r"^layers\.1\.down$",)
