"""AdapterFusion: adapters from memory and from folders, what trains, penalty, weights, and adapters let go of."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from tests import zoo

STAGE_ONE = jpeft.Pfeiffer(bottleneck_size=3, layers=[0, 2], scaling=2.0)
AT = "encoder/layer/output/dense"


@functools.cache
def base() -> Any:
    return zoo.MODELS["bert-mean-classifier"].make("float32")


@functools.cache
def tasks(count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    parts = jpeft.partition(STAGE_ONE(base(), rngs=0))
    return [(zoo.trained(parts, seed, size=0.5), parts.buffers) for seed in range(count)]


def combined(model: Any, adapter: Any) -> Any:
    parts = jpeft.partition(model)
    return jpeft.combine(parts.graphdef, {**parts.adapter, **adapter}, parts.buffers, parts.frozen)


def fused(count: int = 3, **settings: Any) -> Any:
    return jpeft.fuse(STAGE_ONE(base(), rngs=0), tasks(count), rngs=1, **settings)


def test_only_the_attention_and_the_head_train() -> None:
    parts = jpeft.partition(fused())
    assert {key: value.shape for key, value in parts.adapter.items()} == {
        **{f"{AT}/fusion/{name}": (2, zoo.WIDTH, zoo.WIDTH) for name in ("query", "key", "value")},
        f"{AT}/fusion/query_bias": (2, zoo.WIDTH),
        "classifier/kernel": (zoo.WIDTH, 3),
        "classifier/bias": (3,),
    }
    assert parts.buffers[f"{AT}/fusion/down"].shape == (2, 3, zoo.WIDTH, 3)  # layers, tasks, in, bottleneck
    for number, (adapter, _) in enumerate(tasks(3)):
        for name in ("down", "down_bias", "up", "up_bias"):
            assert jnp.array_equal(parts.buffers[f"{AT}/fusion/{name}"][:, number], adapter[f"{AT}/pfeiffer/{name}"])
    assert parts.buffers[f"{AT}/fusion/scale"].tolist() == [[2.0] * 3] * 2


def test_one_adapter_alone_is_that_adapter() -> None:
    (adapter, _), *_ = tasks(3)
    alone = combined(STAGE_ONE(base(), rngs=0), {key: v for key, v in adapter.items() if "pfeiffer" in key})
    assert zoo.relative(fused(1)(zoo.ids()), alone(zoo.ids())) < 1e-5


def test_weights_can_be_looked_at_and_follow_the_input() -> None:
    model = fused()
    values = zoo.trained(jpeft.partition(model))
    seen = jpeft.observe(combined(model, values), zoo.ids())
    assert seen.keys() == {f"encoder/layer/{layer}/output/dense/fusion/attention" for layer in (0, 2)}
    for weights in seen.values():
        assert weights.shape == (zoo.BATCH, zoo.TIME, 3)
        assert jnp.allclose(jnp.sum(weights, -1), 1, atol=1e-6)
        assert float(jnp.std(weights, axis=(0, 1)).max()) > 1e-4


def test_the_penalty_holds_the_values_to_the_identity() -> None:
    model = fused(regularization=0.5)
    off_diagonal = 2 * zoo.WIDTH * (zoo.WIDTH - 1)  # in two layers
    assert float(jpeft.penalty(model)) == pytest.approx(0.5 * off_diagonal * 1e-12, rel=1e-3)
    twice = {f"{AT}/fusion/value": jnp.stack([2.0 * jnp.eye(zoo.WIDTH)] * 2)}
    assert float(jpeft.penalty(combined(model, twice))) == pytest.approx(0.5 * 2 * zoo.WIDTH)

    def penalty(value: jax.Array) -> jax.Array:
        return jpeft.penalty(combined(model, {f"{AT}/fusion/value": value}))

    gradient = jax.jit(jax.grad(penalty))(twice[f"{AT}/fusion/value"])
    assert jnp.allclose(gradient, 0.5 * 2 * jnp.eye(zoo.WIDTH), atol=1e-6)


def test_from_folders_as_from_memory(tmp_path: Path) -> None:
    """The adapters' own heads, here of another number of classes, stay behind."""
    folders = []
    for number, (adapter, _) in enumerate(tasks(2)):
        folders.append(str(tmp_path / f"task-{number}"))
        jpeft.save_adapter(folders[-1], combined(STAGE_ONE(base(), rngs=0), adapter))
    config, task, settings = zoo.FAMILIES["bert-mean-classifier"]
    other = jpeft.models.from_config(config, task=task, rngs=nnx.Rngs(0), **{**settings, "num_labels": 5})
    made = jpeft.AdapterFusion(adapters=folders)(other, rngs=1)
    parts, expected = jpeft.partition(made), jpeft.partition(fused(2))
    assert parts.adapter["classifier/bias"].shape == (5,)
    assert all(jnp.array_equal(parts.buffers[key], value) for key, value in expected.buffers.items())
    assert jnp.array_equal(parts.adapter[f"{AT}/fusion/query"], expected.adapter[f"{AT}/fusion/query"])
    assert jpeft.applied(made) == jpeft.applied(fused(2))  # what is recorded needs the folders no more
    jpeft.save_adapter(tmp_path / "fused", made)
    # The other way round the same adapters have other numbers, which the arrays follow.
    turned = jpeft.partition(jpeft.AdapterFusion(adapters=folders[::-1])(other, rngs=1)).buffers
    assert all(jnp.array_equal(jnp.flip(turned[key], 1), value) for key, value in parts.buffers.items())
    with pytest.raises(jpeft.JpeftError, match=r"there is no folder .*task-7"):
        jpeft.AdapterFusion(adapters=[*folders, tmp_path / "task-7"])(other, rngs=1)

    # What is saved is whole: another process has the same logits, and no need of the adapters it was made of.
    hidden = [Path(folder).rename(f"{folder}-away") for folder in folders]
    np.save(tmp_path / "logits.npy", made(zoo.ids()))
    script = textwrap.dedent(
        f"""
        import numpy as np
        from flax import nnx
        import jpeft
        from tests import zoo
        config, task, settings = zoo.FAMILIES["bert-mean-classifier"]
        base = jpeft.models.from_config(config, task=task, rngs=nnx.Rngs(0), **{{**settings, "num_labels": 5}})
        model = jpeft.load_adapter({str(tmp_path / "fused")!r}, base)
        assert np.array_equal(model(zoo.ids()), np.load({str(tmp_path / "logits.npy")!r}))
        """
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(jpeft.__file__).parents[1])
    for folder, away in zip(folders, hidden, strict=True):
        away.rename(folder)

    jpeft.save_adapter(tmp_path / "wide", jpeft.Pfeiffer(bottleneck_size=4)(base(), rngs=0))
    with pytest.raises(jpeft.JpeftError, match=r"wide' holds .*bottleneck_size=4.* but .*bottleneck_size=3"):
        jpeft.AdapterFusion(adapters=[*folders, tmp_path / "wide"])(other, rngs=1)
    with pytest.raises(jpeft.JpeftError, match="was trained on another base"):
        jpeft.AdapterFusion(adapters=folders)(zoo.MODELS["gpt2"].make("float32"), rngs=1)


def test_adapters_are_let_go_of(tmp_path: Path) -> None:
    model = fused()
    values = zoo.trained(jpeft.partition(model))
    dropped = jpeft.drop_adapters(combined(model, values), fused=[1])
    two = [tasks(3)[0], tasks(3)[2]]
    expected = combined(jpeft.fuse(STAGE_ONE(base(), rngs=0), two, rngs=1), values)
    assert zoo.relative(dropped(zoo.ids()), expected(zoo.ids())) < 1e-6
    jpeft.save_adapter(tmp_path / "dropped", dropped)
    assert jnp.array_equal(jpeft.load_adapter(tmp_path / "dropped", base())(zoo.ids()), dropped(zoo.ids()))
    upper = jpeft.drop_adapters(dropped, [0])  # and of a layer
    assert jpeft.partition(upper).buffers[f"{AT}/fusion/down"].shape == (1, 2, zoo.WIDTH, 3)
    with pytest.raises(jpeft.JpeftError, match=r"fused=\[3\], but the model has 3, of which one must stay"):
        jpeft.drop_adapters(model, fused=[3])
    with pytest.raises(jpeft.JpeftError, match="of which one must stay"):
        jpeft.drop_adapters(model, fused=[0, 1, 2])
    with pytest.raises(jpeft.JpeftError, match="but the model has none"):
        jpeft.drop_adapters(STAGE_ONE(base(), rngs=0), fused=[0])


def test_what_cannot_be_fused() -> None:
    with pytest.raises(jpeft.JpeftError, match=r"has norms of its own.*train_norms=False"):
        jpeft.fuse(jpeft.Houlsby()(base(), rngs=0), tasks(2), rngs=0)
    with pytest.raises(jpeft.JpeftError, match=r"the model' holds .*LoRA.*it fuses Pfeiffer or Houlsby"):
        jpeft.fuse(jpeft.LoRA(rank=2, targets="query")(base(), rngs=0), tasks(2), rngs=0)
    with pytest.raises(jpeft.JpeftError, match="fuse: no tasks"):
        jpeft.fuse(STAGE_ONE(base(), rngs=0), [], rngs=0)
    adapter, buffers = tasks(2)[0]
    with pytest.raises(jpeft.JpeftError, match=r"pfeiffer/up' is missing in task 1"):
        jpeft.fuse(
            STAGE_ONE(base(), rngs=0),
            [tasks(2)[0], ({k: v for k, v in adapter.items() if "/up" not in k}, buffers)],
            rngs=0,
        )
    for settings, said in (
        ({}, "give adapters=, the folders"),
        ({"adapter": STAGE_ONE}, "tasks=0"),
        ({"adapter": {"method": "lora"}, "tasks": 2}, "its method is not"),
        ({"adapters": ["a"], "tasks": 2}, "not both"),
        ({"adapter": STAGE_ONE, "tasks": 2, "dropout": 1.0}, "dropout=1.0"),
    ):
        with pytest.raises(jpeft.JpeftError, match=said):
            jpeft.AdapterFusion(**settings)
