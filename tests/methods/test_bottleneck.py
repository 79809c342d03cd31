"""Bottleneck adapters: where they stand, how they start, what is refused, and AdapterDrop."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.methods.bottleneck_wrappers import start
from tests import zoo


@functools.cache
def base(name: str) -> Any:
    return zoo.MODELS[name].make("float32")


def places(method: jpeft.Method, name: str) -> set[str]:
    """Where the adapters of an abstract model stand."""
    model = nnx.eval_shape(lambda: method(zoo.MODELS[name].make("float32"), rngs=0))
    return {key.removesuffix("/down") for key in jpeft.partition(model).adapter if key.endswith("/down")}


def test_places_are_those_that_the_model_declares() -> None:
    assert places(jpeft.Houlsby(train_norms=False), "t5") == {
        f"{stack}/block/layer/{number}/{name}/houlsby"
        for stack, number, name in (
            ("encoder", 0, "SelfAttention/o"),
            ("encoder", 1, "DenseReluDense/wo"),
            ("decoder", 0, "SelfAttention/o"),
            ("decoder", 1, "EncDecAttention/o"),
            ("decoder", 2, "DenseReluDense/wo"),
        )
    }
    assert places(jpeft.ParallelAdapter(), "t5") == {
        "encoder/block/layer/1/DenseReluDense/parallel",
        "decoder/block/layer/2/DenseReluDense/parallel",
    }
    assert places(jpeft.ParallelAdapter(), "gpt2") == {"h/mlp/parallel"}
    assert places(jpeft.Pfeiffer(), "llama") == {"layers/mlp/down_proj/pfeiffer"}
    assert places(jpeft.Pfeiffer(), "llama-nf4") == {"layers/mlp/down_proj/pfeiffer"}


def test_widths_of_the_bottleneck() -> None:
    def shape(method: jpeft.Method) -> tuple[int, ...]:
        made = nnx.eval_shape(lambda: method(zoo.MODELS["llama"].make("float32"), rngs=0))
        return jpeft.partition(made).adapter["layers/mlp/down_proj/pfeiffer/down"].shape

    assert shape(jpeft.Pfeiffer()) == (3, zoo.WIDTH, 1)  # 12 / 16, but at least one unit
    assert shape(jpeft.Pfeiffer(reduction_factor=2.5)) == (3, zoo.WIDTH, 4)
    assert shape(jpeft.Pfeiffer(bottleneck_size=7, layers=[2])) == (1, zoo.WIDTH, 7)
    lower, upper = jpeft.Pfeiffer(layers=[0]), jpeft.Pfeiffer(layers=[1, 2], bottleneck_size=3, name="wide")
    both = jpeft.partition(jpeft.compose(lower, upper)(base("llama"), rngs=0)).adapter
    assert both["layers/mlp/down_proj/pfeiffer/up"].shape == (1, 1, zoo.WIDTH)
    assert both["layers/mlp/down_proj/wide/up"].shape == (2, 3, zoo.WIDTH)


def test_widths_by_layer_equal_adapters_of_their_own(tmp_path: Any) -> None:
    pattern = {"layers.0": 2, r"layers\.2\..*": 5}
    method = jpeft.Pfeiffer(bottleneck_size=3, bottleneck_pattern=pattern, init="bert", activation="gelu")
    made = method(base("llama"), rngs=0)
    plain = jpeft.compose(
        *(
            jpeft.Pfeiffer(bottleneck_size=width, init="bert", activation="gelu", layers=[layer], name=f"at_{layer}")
            for layer, width in enumerate((2, 3, 5))
        )
    )(base("llama"), rngs=0)
    parts, ragged = jpeft.partition(made), jpeft.partition(plain)
    place = "layers/mlp/down_proj"
    assert parts.adapter[f"{place}/pfeiffer/down"].shape == (3, zoo.WIDTH, 5)
    own = dict(ragged.adapter)
    for layer, width in enumerate((2, 3, 5)):
        for name, cut in (
            ("down", np.s_[:, :width]),
            ("down_bias", np.s_[:width]),
            ("up", np.s_[:width]),
            ("up_bias", ...),
        ):
            value = parts.adapter[f"{place}/pfeiffer/{name}"][layer]
            assert not (np.abs(value).sum() - np.abs(value[cut]).sum() > 1e-6)  # nothing but zeros beyond
            own[f"{place}/at_{layer}/{name}"] = value[cut][None]

    def loss(parts: Any, adapter: Any) -> Any:
        return (jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)(zoo.ids()) ** 2).mean()

    value, gradient = jax.jit(jax.value_and_grad(lambda adapter: loss(parts, adapter)))(parts.adapter)
    assert float(value) == pytest.approx(float(jax.jit(lambda adapter: loss(ragged, adapter))(own)), rel=1e-5)
    assert not gradient[f"{place}/pfeiffer/down"][0, :, 2:].any()
    assert not gradient[f"{place}/pfeiffer/up"][1, 3:].any()
    assert gradient[f"{place}/pfeiffer/up"][1, :3].any()
    jpeft.save_adapter(tmp_path / "a", made)
    assert jpeft.applied(jpeft.load_adapter(tmp_path / "a", base("llama"))) == (method,)
    with pytest.raises(jpeft.JpeftError, match="bottleneck_pattern entries that match no adapted module: 'layers.7'"):
        jpeft.Pfeiffer(bottleneck_pattern={"layers.7": 2})(base("llama"), rngs=0)


def test_members_that_a_layer_has_not_take_no_part() -> None:
    """Of three layers one has both adapters, one has one, one has none."""
    method = jpeft.compose(
        jpeft.Pfeiffer(targets="down", layers=[0], name="first"),
        jpeft.Pfeiffer(targets="down", layers=[0, 1], name="second"),
    )
    stacked, listed = (method(zoo.UserModel(nnx.Rngs(0), stacked=form), rngs=0) for form in (True, False))
    parts, apart = jpeft.partition(stacked), jpeft.partition(listed)
    values = zoo.trained(parts, size=0.5)
    each = {key: values[key.replace(f"/{key.split('/')[1]}/", "/", 1)][int(key.split("/")[1])] for key in apart.adapter}
    ids = zoo.ids()
    listed = jpeft.combine(apart.graphdef, each, apart.buffers, apart.frozen)
    assert [getattr(layer.down, "name", None) for layer in listed.layers] == ["second", "second", None]
    assert listed.layers[0].down.base.name == "first"
    assert type(listed.layers[1].down.base) is type(listed.layers[2].down) is nnx.Linear
    made = jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen)
    assert zoo.relative(made(ids), listed(ids)) < 1e-5
    without = {key: value * ("second" in key) for key, value in each.items()}
    assert zoo.relative(jpeft.combine(apart.graphdef, without, *apart[2:])(ids), listed(ids)) > 1e-3


def test_initial_values() -> None:
    key, scales = jax.random.key(0), {"lora": 1 / np.sqrt(3 * 64), "houlsby": 0.0088, "bert": 0.02}
    for init, scale in scales.items():
        made = start(init, key, 64, 64, 48)
        assert np.std(made["down"]) == pytest.approx(scale, rel=0.05)
        assert np.std(made["up"]) == pytest.approx(0.0 if init == "lora" else scale, rel=0.05)
        assert not made["down_bias"].any()
        assert not made["up_bias"].any()
    assert jnp.max(jnp.abs(start("houlsby", key, 64, 64, 48)["down"])) <= 0.02
    adapted = jpeft.Pfeiffer(init="houlsby")(base("llama"), rngs=0)
    assert 0 < zoo.relative(adapted(zoo.ids()), base("llama")(zoo.ids())) < 1e-2


def test_a_learned_scale_starts_at_one_and_a_number_is_a_buffer() -> None:
    learned = jpeft.partition(jpeft.Pfeiffer(scaling="learned")(base("llama"), rngs=0))
    assert learned.adapter["layers/mlp/down_proj/pfeiffer/scale"].tolist() == [1.0] * 3
    fixed = jpeft.partition(jpeft.Pfeiffer(scaling=0.5)(base("llama"), rngs=0))
    assert fixed.buffers["layers/mlp/down_proj/pfeiffer/scale"].tolist() == [0.5] * 3


def test_norms_train_where_they_are_asked_for() -> None:
    def norms(method: jpeft.Method, name: str = "llama") -> dict[str, tuple[int, ...]]:
        adapter = jpeft.partition(method(base(name), rngs=0)).adapter
        return {key: value.shape for key, value in adapter.items() if key.endswith("houlsby/scale")}

    assert norms(jpeft.Houlsby()) == {
        "layers/input_layernorm/houlsby/scale": (3, zoo.WIDTH),
        "layers/post_attention_layernorm/houlsby/scale": (3, zoo.WIDTH),
        "norm/houlsby/scale": (zoo.WIDTH,),
    }
    assert set(norms(jpeft.Houlsby(layers=[1])).values()) == {(1, zoo.WIDTH)}
    assert not norms(jpeft.Houlsby(train_norms=False))
    assert not norms(jpeft.Pfeiffer())
    with pytest.raises(jpeft.JpeftError, match=r"norms=, or set train_norms=False"):
        jpeft.Houlsby(targets="down")(base("user-list"), rngs=0)


def test_a_predicate_is_recorded_with_the_layers_it_chose() -> None:
    method = jpeft.Houlsby(targets=lambda name, module: name.endswith("down"), norms="norm", layers=[1])
    recorded = jpeft.applied(method(base("user-list"), rngs=0))
    assert [type(part) for part in recorded] == [jpeft.Houlsby, jpeft.NormTuning]
    again = jpeft.compose(*recorded)(base("user-list"), rngs=0)
    made = jpeft.partition(method(base("user-list"), rngs=0))
    assert jpeft.partition(again).graphdef == made.graphdef


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation": "sine"}, "activation='sine'; choose 'relu'"),
        ({"reduction_factor": 0}, "reduction_factor=0 is not positive"),
        ({"bottleneck_size": 0}, "bottleneck_size=0 is not a whole number"),
        ({"bottleneck_pattern": {"layers.0": 0}}, r"bottleneck_pattern\['layers.0'\]=0 is not a whole number"),
        ({"bottleneck_pattern": [4]}, r"bottleneck_pattern=\[4\] is no mapping"),
        ({"scaling": "often"}, "scaling='often'"),
        ({"init": "kaiming"}, "init='kaiming'; choose 'lora'"),
        ({"drop": -1}, "drop=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=f"Pfeiffer: {said}"):
        jpeft.Pfeiffer(**settings)


def test_modules_without_a_width_are_refused_by_name() -> None:
    with pytest.raises(jpeft.JpeftError, match=r"Block.*one width as its out_features.*'layers/0'"):
        jpeft.Pfeiffer(targets=r"layers\.\d")(base("user-list"), rngs=0)
    with pytest.raises(jpeft.JpeftError, match="declare its 'feed_forward' modules"):
        jpeft.ParallelAdapter()(base("user-list"), rngs=0)


def test_merging_says_why_not() -> None:
    adapted = jpeft.Houlsby()(base("llama"), rngs=0)
    with pytest.raises(
        jpeft.JpeftError, match=r"layers/mlp/down_proj \(houlsby\): a network with an activation is not"
    ):
        jpeft.merge(adapted)


def test_dropout_is_of_the_bottleneck() -> None:
    parts = jpeft.partition(jpeft.Pfeiffer(dropout=0.5, bottleneck_size=6)(base("llama"), rngs=0))
    values = zoo.trained(parts, size=0.5)
    run = jax.jit(
        lambda key: jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen, dropout=key)(zoo.ids())
    )
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jnp.array_equal(first, again)
    assert zoo.relative(first, other) > 1e-3


def test_lower_layers_go_without_in_some_steps_and_nothing_is_compiled_anew() -> None:
    """AdapterDrop, section 3 of the paper: n is drawn for each step, and is the same at every adapter of a layer."""
    method = jpeft.Houlsby(bottleneck_size=3, drop=2, train_norms=False)
    parts = jpeft.partition(method(base("llama"), rngs=0))
    values = zoo.trained(parts)

    @jax.jit
    def run(values: Any, buffers: Any, key: jax.Array) -> jax.Array:
        return jpeft.combine(parts.graphdef, values, buffers, parts.frozen, dropout=key)(zoo.ids())

    whole = jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen)(zoo.ids())

    def without(lowest: int) -> jax.Array:
        """By hand: the scales of the lower layers set to 0."""
        buffers = {
            key: value.at[:lowest].set(0) if key.endswith("scale") else value for key, value in parts.buffers.items()
        }
        return jpeft.combine(parts.graphdef, values, buffers, parts.frozen)(zoo.ids())

    expected = [without(lowest) for lowest in range(3)]
    assert zoo.relative(expected[0], whole) < 1e-6
    drawn = []
    for seed in range(30):
        made = run(values, parts.buffers, jax.random.key(seed))
        near = [lowest for lowest in range(3) if zoo.relative(made, expected[lowest]) < 1e-5]
        assert len(near) == 1
        drawn += near
    assert run._cache_size() == 1
    assert {lowest: drawn.count(lowest) > 3 for lowest in range(3)} == {0: True, 1: True, 2: True}
