"""`--dry-run`: every check, the compiled step's figures, no weights, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from typer.testing import CliRunner

import jpeft.models
from jpeft import JpeftError
from train import config as configs
from train.cli import app
from train.flops import flops
from train.materials import Materials
from train.plan import steps_of
from train.run import adapted
from train.schema import TrainingConfig


@pytest.fixture
def config(llama: Path, jsonl: Callable[..., Path], config_file: Callable[..., Path], tmp_path: Path) -> Path:
    """A run on a model of which only config.json and the tokenizer are here."""
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    rows = jsonl([{"text": "what is it ?", "answer": "red"}] * 40)
    return config_file(
        f"model: {{source: {bare}, task: causal-lm}}\n"
        "method: {name: lora, rank: 4, targets: all-linear}\n"
        f"data: {{source: {rows}, prompt: text, completion: answer, test_size: 8, max_length: 32}}\n"
        "training: {epochs: 2, batch_size: 4}\n"
        f"output: {{folder: {tmp_path / 'run'}}}\n"
    )


def test_a_plan_without_weights(config: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(config), "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0
    said = done.output
    assert re.search(r"steps 16 of 4 rows, padded to \d+ tokens: 1 program to compile", " ".join(said.split()))
    assert "layers/self_attn/q_proj/lora/a" in said
    linear = re.search(r"target +all-linear: (.*?)\n(steps|target)", said, re.DOTALL)
    assert linear is not None
    assert {f"layers/mlp/{name}_proj" for name in ("gate", "up", "down")} < set(re.split(r"[,\s]+", linear[1]))
    assert "nothing was trained or written" in said
    assert not (tmp_path / "run").exists()

    # A mistake in method or data is found as in a run; weights that are packed take less.
    with pytest.raises(JpeftError, match=r"'q_prj' matches nothing"):
        CliRunner().invoke(app, ["train", str(config), "method.targets=[q_prj]", "--dry-run"], catch_exceptions=False)
    packed = CliRunner().invoke(
        app, ["train", str(config), "model.base=nf4", "training.max_steps=20", "--dry-run"], catch_exceptions=False
    )
    assert frozen(packed.output) < frozen(said)

    # Fewer steps than asked for are said; without epochs, there are as many as it takes.
    words = "training.max_steps is 20, but training.epochs=2 ends the run after 16 steps; leave epochs out to train for"
    assert words in " ".join(packed.output.split())
    assert words[:20] not in said


def test_methods_that_start_from_the_base_have_a_plan_too(config: Path) -> None:
    made = configs.load(config)
    materials = Materials(made, abstract=True)
    for method in (
        {"name": "dora", "rank": 2},
        {"name": "lora", "init": "pissa"},
        {"name": "prompt_tuning"},
        {"name": "prefix_tuning", "reparameterize": False, "num_virtual_tokens": 2, "init": "text", "text_ids": [3, 4]},
        {"name": "norm_tuning"},
        {"name": "houlsby"},
        {"name": "trainable_tokens", "tokens": [3]},
        [{"name": "lora"}, {"name": "norm_tuning"}],
    ):
        model = adapted(made.model_copy(update={"method": method}), materials)
        assert jpeft.describe(model).trainable > 0
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(jpeft.partition(model)[1:]))


def test_no_target_trains_as_a_whole_unless_it_is_asked_to(config: Path) -> None:
    made = configs.load(config)
    materials = Materials(made, abstract=True)

    def trained(method: Any) -> set[str]:
        rows = jpeft.describe(adapted(made.model_copy(update={"method": method}), materials)).rows
        return {row.path for row in rows if row.trainable}

    low_rank = {f"{path}/lora/{factor}" for path in ("embed_tokens", "layers/self_attn/q_proj") for factor in "ab"}
    lora = {"name": "lora", "targets": ["q_proj", "embed_tokens"]}
    assert trained(lora) == low_rank
    # The head is the embedding's matrix, which is there once.
    with pytest.raises(JpeftError, match="target 'lm_head' matches nothing"):
        trained({**lora, "targets": ["q_proj", "lm_head"]})
    full = {"name": "full_tuning", "targets": ["norm"]}
    assert trained([lora, full]) == {*low_rank, "norm/full/scale"}
    assert trained({"name": "trainable_tokens", "tokens": [3]}) == {"embed_tokens/tokens/rows"}


def test_epochs_and_steps() -> None:
    assert steps_of(TrainingConfig(), 7) == (7, "")  # type: ignore[call-arg]
    assert steps_of(TrainingConfig(epochs=3), 7) == (21, "")  # type: ignore[call-arg]
    assert steps_of(TrainingConfig(max_steps=30), 7) == (30, "")  # type: ignore[call-arg]
    assert steps_of(TrainingConfig(epochs=3, max_steps=21), 7) == (21, "")  # type: ignore[call-arg]
    assert steps_of(TrainingConfig(epochs=3, max_steps=5), 7) == (5, "")  # type: ignore[call-arg]
    assert steps_of(TrainingConfig(epochs=3, max_steps=22), 7)[0] == 21  # type: ignore[call-arg]


def frozen(said: str) -> float:
    """KiB of frozen weights, as the plan has it."""
    words = said.split("frozen weights ")[1].split()
    assert words[1].startswith("KiB")
    return float(words[0])


def test_abstract_is_what_load_gives(llama: Path, bert: Path) -> None:
    head = {"task": "sequence-classification", "num_labels": 3}
    for source, settings in (
        (llama, {"quantize": "nf4"}),
        (bert, head),
    ):
        shapes, real = (
            {row.path: (row.shape, row.dtype, row.trainable) for row in jpeft.describe(make(source, **settings)).rows}
            for make in (jpeft.models.abstract, jpeft.models.load)
        )
        assert shapes == real


def test_flops_of_loops_and_calls() -> None:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jax.nn.relu(x @ w), None

    def stack(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0])

    x, w = jnp.ones((5, 8)), jnp.ones((3, 8, 8))
    assert flops(jax.make_jaxpr(stack)(x, w).jaxpr) == 3 * 2 * 5 * 8 * 8
    # The backward pass recomputes the product and makes two more.
    assert flops(jax.make_jaxpr(jax.grad(jax.jit(stack), (0, 1)))(x, w).jaxpr) in (3 * 4 * 640, 3 * 3 * 640)


def test_flops_of_branches_kernels_and_devices() -> None:
    x, w = jnp.ones((16, 8)), jnp.ones((8, 8))

    def one_branch(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    assert flops(jax.make_jaxpr(one_branch)(x).jaxpr) == 2 * 2 * 16 * 8 * 8

    def kernel(x: jax.Array) -> jax.Array:
        def tile(x_ref: Any, out_ref: Any) -> None:
            out_ref[...] = x_ref[...] @ x_ref[...].T

        rows, square = pl.BlockSpec((4, 8), lambda i: (i, 0)), pl.BlockSpec((4, 4), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct((x.shape[0], 4), x.dtype)
        grid = (x.shape[0] // 4,)
        return pl.pallas_call(tile, shape, grid=grid, in_specs=[rows], out_specs=square, interpret=True)(x)

    assert flops(jax.make_jaxpr(kernel)(x).jaxpr) == 4 * 2 * 4 * 8 * 4
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.sharding.PartitionSpec("data")
    spread = jax.shard_map(kernel, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    assert flops(jax.make_jaxpr(spread)(x).jaxpr) == 4 * 2 * 4 * 8 * 4


# What Meta's and Qwen's config.json say of the sizes.
LARGE = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen3-v5e": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
LARGE["qlora-llama-8b"] = LARGE["llama-8b"]
LARGE["qlora-llama-70b"] = {
    **LARGE["llama-8b"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


@pytest.mark.parametrize("name", LARGE)
def test_configurations_for_large_machines(name: str, llama: Path, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """They are planned here, on shapes alone, in the seconds that compiling takes."""
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (bare / "config.json").write_text(json.dumps(LARGE[name]))
    turns = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "red " * 80}]
    rows = jsonl([{"messages": turns}] * 200)
    overrides = [f"model.source={bare}", f"data.source={rows}", f"output.folder={tmp_path / 'run'}"]
    done = CliRunner().invoke(app, ["train", f"configs/{name}.yaml", *overrides, "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0
    said = done.output
    unit = {"MiB": 1 / 1024, "GiB": 1.0}
    number, name_of = re.search(r"frozen weights ([\d.]+) (\w+)", said).groups()  # type: ignore[union-attr]
    wanted = {
        "llama-8b": (14.96, 7.5e9),
        "qlora-llama-8b": (5.3, 7.5e9),
        "qlora-llama-70b": (37.5 / 8, 69.5e9),
        "qwen3-v5e": (7.49 / 8, 4e9),
    }
    expected, parameters = wanted[name]
    assert float(number) * unit[name_of] == pytest.approx(expected, rel=0.03)
    # A step costs four times parameters times tokens, and recomputing the layers about two more.
    length, work = re.search(r"of (\d+) tokens a row: ([\d.]+) TFLOP", said).groups()  # type: ignore[union-attr]
    assert 4 * parameters * 16 * int(length) < float(work) * 1e12 < 7.5 * parameters * 16 * int(length)
