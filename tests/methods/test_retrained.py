"""Training what the model has: which variables are copied, what is refused, and what a method on a tied head sees."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jpeft
from tests import zoo


@functools.cache
def base(name: str) -> Any:
    return zoo.MODELS[name].make("float32")


def keys(model: Any) -> list[str]:
    return list(jpeft.partition(model).adapter)


def test_bitfit_trains_every_bias_and_starts_from_it() -> None:
    model = base("bert-mean-classifier")
    adapter = jpeft.partition(jpeft.BitFit()(model, rngs=0)).adapter
    own = {path for path in jpeft.partition(model).frozen if path.endswith("/bias")}
    copies = {path.replace("/bitfit/", "/") for path in adapter if "/bitfit/" in path}
    assert copies == own  # the new head trains by itself
    at = "encoder/layer/attention/self/query"
    assert jnp.array_equal(adapter[f"{at}/bitfit/bias"], jpeft.partition(model).frozen[f"{at}/bias"])


def test_bitfit_trains_the_biases_chosen() -> None:
    chosen = jpeft.BitFit(targets=["query", "intermediate.dense"], layers=[1])(base("bert-mean-classifier"), rngs=0)
    adapter = {key: value.shape for key, value in jpeft.partition(chosen).adapter.items() if "bitfit" in key}
    assert adapter == {
        "encoder/layer/attention/self/query/bitfit/bias": (1, zoo.WIDTH),
        "encoder/layer/intermediate/dense/bitfit/bias": (1, 20),
    }


def test_a_model_without_biases_is_refused_or_gets_new_ones() -> None:
    with pytest.raises(jpeft.JpeftError, match=r"matches nothing.*new_biases=True"):
        jpeft.BitFit()(base("llama"), rngs=0)
    adapted = jpeft.BitFit(new_biases=True)(base("llama"), rngs=0)
    assert "layers/mlp/up_proj/bitfit/bias" in keys(adapted)
    parts = jpeft.partition(adapted)
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    merged = jpeft.merge(model)
    assert merged.layers.layer.mlp.up_proj.bias.shape == (3, 20)
    assert zoo.relative(merged(zoo.ids()), model(zoo.ids())) < 1e-5


def test_new_biases_of_some_layers_cannot_be_merged() -> None:
    with pytest.raises(jpeft.JpeftError, match=r"new bias covers layers \[1\] only"):
        jpeft.merge(jpeft.BitFit(new_biases=True, targets="up_proj", layers=[1])(base("llama"), rngs=0))


def test_norms_are_those_the_model_declares() -> None:
    found = {key.split("/norm_tuned/")[0] for key in keys(jpeft.NormTuning(name="norm_tuned")(base("llama"), rngs=0))}
    assert found == {"layers/input_layernorm", "layers/post_attention_layernorm", "norm"}
    with pytest.raises(jpeft.JpeftError, match="matches nothing"):
        jpeft.NormTuning(targets="down_proj")(base("llama"), rngs=0)


def test_a_tied_head_follows_its_embedding() -> None:
    model = base("user-list")
    parts = jpeft.partition(jpeft.FullTuning(targets="embed")(model, rngs=0))
    tuned = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    again = nnx.clone(model)
    again.embed.embedding = nnx.Param(zoo.trained(parts)["embed/full/embedding"])
    assert zoo.relative(tuned(zoo.ids()), again(zoo.ids())) < 1e-6


def test_half_precision_trains_in_float32() -> None:
    adapted = jpeft.FullTuning(targets="norm")(zoo.MODELS["llama"].make("bfloat16"), rngs=0)
    assert {value.dtype for value in jpeft.partition(adapted).adapter.values()} == {jnp.dtype("float32")}
    assert adapted(zoo.ids()).dtype == jnp.bfloat16


def test_a_module_inside_a_wrapper_is_trained_beside_it() -> None:
    both = jpeft.compose(jpeft.LoRA(rank=2, targets="up"), jpeft.BitFit(targets="up"))
    model = both(base("user-list"), rngs=0)
    assert {key.split("/", 2)[2] for key in keys(model)} == {"up/lora/a", "up/lora/b", "up/bitfit/bias"}
    parts = jpeft.partition(model)
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    assert zoo.relative(jpeft.merge(model)(zoo.ids()), model(zoo.ids())) < 1e-5


def test_quantised_weights_are_never_copied() -> None:
    with pytest.raises(jpeft.JpeftError, match="matches nothing"):
        jpeft.FullTuning(targets="up_proj")(base("llama-nf4"), rngs=0)


def test_rows_of_a_batch_use_copies_of_their_own() -> None:
    model = base("llama")
    adapted = jpeft.NormTuning()(model, rngs=0)
    parts = jpeft.partition(adapted)
    values = [zoo.trained(parts, seed) for seed in (1, 2)]
    one, two = (jpeft.combine(parts.graphdef, value, parts.buffers, parts.frozen) for value in values)
    many = jpeft.partition(jpeft.multi(adapted, [(value, parts.buffers) for value in values]))
    ids = jnp.concatenate([zoo.ids(), zoo.ids()[:1]])
    rows = jpeft.combine(*many, adapter_ids=jnp.array([1, 0, -1]))(ids)
    expected = [two(ids)[0], one(ids)[1], model(ids)[2]]
    assert zoo.relative(rows, jnp.stack(expected)) < 1e-5
    with pytest.raises(jpeft.JpeftError, match="expected one per row"):
        jpeft.combine(*many, adapter_ids=jnp.array([1]))(ids)


def test_the_base_outlives_a_donated_copy() -> None:
    model = base("gpt2")
    parts = jpeft.partition(jpeft.BitFit()(model, rngs=0))
    jax.jit(lambda adapter: jax.tree.map(jnp.zeros_like, adapter), donate_argnums=0)(parts.adapter)
    assert jnp.isfinite(model(zoo.ids())).all()


INNER = (
    jpeft.LoRA(rank=2, targets=["embed", "up"]),
    jpeft.AdaLoRA(rank=2, initial_rank=3, total_steps=9, targets="up"),
    jpeft.OFT(block_size=4, targets="up"),
    jpeft.IA3(targets="up"),
    jpeft.TrainableTokens(tokens=[1, 2], targets="embed"),
    jpeft.NormTuning(targets="norm"),
)
OUTER = (jpeft.FullTuning(targets=["embed", "up"]), jpeft.BitFit(targets="up"))


@pytest.mark.parametrize("inner", INNER, ids=lambda method: method.kind)
@pytest.mark.parametrize("outer", OUTER, ids=lambda method: method.kind)
@pytest.mark.parametrize("first", ["inner", "outer"])
def test_beside_a_method_on_the_same_modules(inner: jpeft.Method, outer: jpeft.Method, first: str) -> None:
    order = (inner, outer) if first == "inner" else (outer, inner)
    model = base("user-stack-remat")
    for method in order:
        before = zoo.MODELS["user-stack-remat"].run(model)
        model = method(model, rngs=0)
        assert zoo.relative(zoo.MODELS["user-stack-remat"].run(model), before) < 1e-5
        parts = jpeft.partition(model)
        model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    run = zoo.MODELS["user-stack-remat"].run
    assert zoo.relative(run(jpeft.merge(model)), run(model)) < 1e-5


def test_a_weight_under_dora_stays_and_its_bias_may_train() -> None:
    run = zoo.MODELS["user-stack-remat"].run
    dora = jpeft.DoRA(rank=2, targets="up", dropout=0.3)(base("user-stack-remat"), rngs=0)
    parts = jpeft.partition(jpeft.BitFit(targets="up")(dora, rngs=0))
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    assert zoo.relative(run(jpeft.merge(model)), run(model)) < 1e-5
    with pytest.raises(jpeft.JpeftError, match=r"FullTuning: 'dora' on 'layers/up' counts on a weight that stays"):
        jpeft.FullTuning(targets="up")(dora, rngs=0)


def test_nothing_is_trained_twice() -> None:
    bert = base("bert-mean-classifier")
    both = jpeft.compose(
        jpeft.Houlsby(bottleneck_size=2, targets=["dense"]), jpeft.BitFit(targets=["query", "LayerNorm"])
    )
    adapter = jpeft.partition(both(bert, rngs=0)).adapter
    norms = [key for key in adapter if key.endswith("/bias") and "LayerNorm" in key]
    assert norms
    assert not any("bitfit" in key for key in norms)  # Houlsby trains them
    assert any("query/bitfit/bias" in key for key in adapter)
    model = base("user-stack-remat")
    some = jpeft.BitFit(targets="up", layers=[0])(model, rngs=0)
    with pytest.raises(
        jpeft.JpeftError, match=r"'bitfit' trains bias of 'layers/up' in layers \[0\] already; give layers"
    ):
        jpeft.FullTuning(targets="up")(some, rngs=0)
    rest = jpeft.FullTuning(targets="up", layers=[1, 2])(some, rngs=0)
    assert {"layers/up/bitfit/bias", "layers/up/full/bias", "layers/up/full/kernel"} <= set(keys(rest))
    with pytest.raises(jpeft.JpeftError, match="BitFit: all that its targets name is trained already"):
        jpeft.BitFit(targets="up", name="again")(jpeft.BitFit(targets="up")(model, rngs=0), rngs=0)
