"""Which modules an entry selects, and what is said when it selects none."""

from __future__ import annotations

import os
import re
from typing import Any

import jax
import pytest
from flax import nnx

import jpeft
from jpeft import targets
from tests import zoo


def adapted(model: nnx.Module, **config: Any) -> set[str]:
    """The canonical paths of the adapted modules."""
    parts = jpeft.partition(jpeft.LoRA(rank=2, **config)(model, rngs=nnx.Rngs(0)))
    return {key.removesuffix("/lora/a") for key in parts.adapter if key.endswith("/a")}


@pytest.fixture(scope="module")
def llama() -> Any:
    return zoo.MODELS["llama"].make("float32")


@pytest.fixture(scope="module")
def deep() -> Any:
    return zoo.UserModel(nnx.Rngs(0), stacked=False, depth=12)


ATTENTION = {f"layers/self_attn/{name}_proj" for name in "qkvo"}
FEED_FORWARD = {f"layers/mlp/{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {"layers/self_attn/q_proj"}),
        ("self_attn.q_proj", {"layers/self_attn/q_proj"}),
        ("layers/self_attn/q_proj", {"layers/self_attn/q_proj"}),
        ("model.layers.0.self_attn.q_proj", {"layers/self_attn/q_proj"}),
        (["q_proj", "down_proj"], {"layers/self_attn/q_proj", "layers/mlp/down_proj"}),
        (r"(q|v)_proj", {"layers/self_attn/q_proj", "layers/self_attn/v_proj"}),
        (r".*\.(q_proj|v_proj)", {"layers/self_attn/q_proj", "layers/self_attn/v_proj"}),
        (r"^layers\.\d+\.mlp\..*", FEED_FORWARD),
        (r"^model\.layers\.\d+\.mlp\..*$", FEED_FORWARD),
        ("all-linear", ATTENTION | FEED_FORWARD),
        (["all-linear", "lm_head"], ATTENTION | FEED_FORWARD | {"lm_head"}),
        (["embed_tokens"], {"embed_tokens"}),
        (nnx.Embed, {"embed_tokens"}),
        (r"layers/self_attn/(q|v)_proj", {"layers/self_attn/q_proj", "layers/self_attn/v_proj"}),
        (lambda name, module: name.endswith("o_proj"), {"layers/self_attn/o_proj"}),
        ([lambda name, module: isinstance(module, nnx.Embed), "k_proj"], {"embed_tokens", "layers/self_attn/k_proj"}),
    ],
)
def test_entries(llama: Any, targets: Any, expected: set[str]) -> None:
    assert adapted(llama, targets=targets) == expected


def test_coverage(llama: Any) -> None:
    wrapped = jpeft.LoRA(rank=2, targets="q_proj")(llama, rngs=nnx.Rngs(0))
    layers = wrapped.layers.length
    assert targets.coverage(wrapped, "q_proj") == {"layers/self_attn/q_proj": (layers, layers)}
    assert targets.coverage(wrapped, r"layers\.[02]\.mlp\.up_proj") == {"layers/mlp/up_proj": (2, layers)}
    assert set(targets.coverage(wrapped, "all-linear")) == ATTENTION | FEED_FORWARD
    assert set(targets.coverage(wrapped, "mlp")) == FEED_FORWARD
    assert targets.coverage(wrapped, "lm_head") == {"lm_head": (1, 1)}
    assert targets.coverage(wrapped, "nothing") == {}


def test_exclude(llama: Any) -> None:
    assert adapted(llama, exclude="mlp") == ATTENTION
    assert adapted(llama, exclude=["self_attn", r"(up|gate)_proj"]) == {"layers/mlp/down_proj"}
    assert adapted(llama, targets=["all-linear"], exclude=lambda name, m: "mlp" in name) == ATTENTION


def test_one_layer_of_a_stack_is_one_layer(llama: Any) -> None:
    parts = jpeft.partition(jpeft.LoRA(rank=2, targets="layers.1.self_attn.q_proj")(llama, rngs=nnx.Rngs(0)))
    assert parts.adapter["layers/self_attn/q_proj/lora/a"].shape == (1, zoo.WIDTH, 2)
    both = jpeft.LoRA(rank=2, targets=r"layers\.[02]\.mlp\.up_proj")(llama, rngs=nnx.Rngs(0))
    assert jpeft.partition(both).adapter["layers/mlp/up_proj/lora/a"].shape == (2, zoo.WIDTH, 2)


def test_whole_segments(deep: Any) -> None:
    assert adapted(deep, targets="up", layers=1) == {"layers/1/up"}
    assert adapted(deep, targets="layers.1.up") == {"layers/1/up"}
    assert adapted(deep, targets=r"layers\.1\.up") == {"layers/1/up"}
    assert "layers/10/up" in adapted(deep, targets="up", exclude="layers.1")
    for exclude in ("layers.1", r"layers\.1", "layers/1", r"^layers\.1$"):
        assert adapted(deep, targets="up", exclude=exclude) == {f"layers/{i}/up" for i in range(12) if i != 1}

    class Lookalike(nnx.Module):
        def __init__(self) -> None:
            self.v_proj, self.kv_proj = (nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2))

    assert adapted(Lookalike(), targets="v_proj") == {"v_proj"}


def test_layers(deep: Any) -> None:
    assert adapted(deep, targets="up", layers=range(10, 12)) == {"layers/10/up", "layers/11/up"}
    assert jpeft.LoRA(layers=range(2)) == jpeft.LoRA(layers=(0, 1)) == jpeft.LoRA(layers=[1, 0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": "q_porj"}, r"'q_porj' matches nothing; nearest names: layers/self_attn/q_proj"),
        ({"targets": ["q_proj", "vproj", "zzz"]}, r"'vproj' matches nothing.*v_proj.*'zzz' matches nothing"),
        ({"targets": "norm"}, r"names 'norm', a RMSNorm; LoRA can wrap Linear, LinearGeneral, Einsum, Conv, Embed"),
        ({"targets": "self_attn"}, r"names 'layers/self_attn', a \w*Attention; LoRA can wrap Linear"),
        ({"targets": ["q_proj", "input_layernorm"]}, r"names 'layers/input_layernorm'"),
        ({"targets": "q_proj", "exclude": "k_porj"}, r"exclude 'k_porj' matches nothing; nearest names: .*k_proj"),
        ({"targets": "q_proj", "exclude": "q_proj"}, r"leaves none"),
        ({"targets": []}, r"targets is empty"),
        ({"targets": lambda name, module: False}, r"predicate .* accepts no module"),
        (
            {"targets": "q_proj", "layers": [0, 7]},
            r"layers=\[7\] not among the layers of the targets, which are 0 to 2",
        ),
        ({"targets": "lm_head", "layers": [0]}, r"no target lies in a numbered layer"),
        (
            {"rank_pattern": {"q_porj": 4}},
            r"rank_pattern entries that match no adapted module: 'q_porj' \(nearest: .*q_proj",
        ),
        ({"targets": "q_proj", "alpha_pattern": {"k_proj": 4}}, r"alpha_pattern entries .* 'k_proj'"),
    ],
)
def test_what_matches_nothing_is_refused(llama: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(jpeft.JpeftError) as caught:
        jpeft.LoRA(**{"rank": 2, **config})(llama, rngs=nnx.Rngs(0))
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("entry", ["(q_proj", "*x", 3, ""])
def test_what_is_no_entry_is_refused(entry: Any) -> None:
    with pytest.raises(jpeft.JpeftError):
        jpeft.LoRA(targets=[entry])


def test_the_first_fitting_pattern_decides(llama: Any) -> None:
    patterns = {"layers.1.self_attn.q_proj": 5, "self_attn": 3, r"layers\.\d+\.mlp\..*": 4, "q_proj": 1}
    with pytest.raises(jpeft.JpeftError, match="match no adapted module: 'zz'"):
        jpeft.LoRA(rank=2, rank_pattern={**patterns, "zz": 1})(llama, rngs=nnx.Rngs(0))
    parts = jpeft.partition(jpeft.LoRA(rank=2, rank_pattern=patterns)(llama, rngs=nnx.Rngs(0)))
    live = {key: (value != 0).sum(-1).tolist() for key, value in parts.buffers.items()}
    assert live["layers/self_attn/q_proj/lora/scale"] == [3, 5, 3]
    assert live["layers/self_attn/v_proj/lora/scale"] == [3, 3, 3]
    assert live["layers/mlp/up_proj/lora/scale"] == [4, 4, 4]


def test_a_tied_layer_is_adapted_once() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.again = self.first

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.again(self.first(x))

    if os.environ.get("NNX_GRAPH_MODE") == "false":
        with pytest.raises(ValueError, match="duplicate|shared|already"):  # tree mode itself refuses shared modules
            jpeft.LoRA(rank=2)(Tied(), rngs=nnx.Rngs(0))
        return
    model = jpeft.LoRA(rank=2)(Tied(), rngs=nnx.Rngs(0))
    assert model.first is model.again
    assert len(jpeft.partition(model).adapter) == 2


def test_a_second_all_linear_wraps_no_wrapper(llama: Any) -> None:
    once = jpeft.LoRA(rank=2)(llama, rngs=nnx.Rngs(0))
    twice = jpeft.LoRA(rank=2, name="more")(once, rngs=nnx.Rngs(0))
    assert len(jpeft.partition(twice).adapter) == 2 * len(jpeft.partition(once).adapter)
    with pytest.raises(
        jpeft.JpeftError, match=r"has an adapter named 'lora' already; give the second one another name"
    ):
        jpeft.LoRA(rank=2)(once, rngs=nnx.Rngs(0))


def test_listing(llama: Any) -> None:
    assert set(jpeft.list_targets(llama)) == ATTENTION | FEED_FORWARD | {"lm_head", "embed_tokens"}


def test_a_predicate_sees_the_module_under_its_wrappers(llama: Any) -> None:
    once = jpeft.LoRA(rank=2)(llama, rngs=nnx.Rngs(0))
    again = jpeft.LoRA(rank=2, name="more", targets=lambda name, module: isinstance(module, nnx.Linear))
    assert "layers/self_attn/q_proj/more/a" in jpeft.partition(again(once, rngs=nnx.Rngs(0))).adapter
