"""Every method on a mesh computes what it computes on one device: outputs, gradients and a step.

In CI a method of each kind runs on the mesh that cuts along all axes, and LoRA on each kind of mesh;
JPEFT_MESHES=all runs every method and model on every mesh, which takes minutes.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.losses import causal_lm_loss
from tests import zoo

ROWS, TIME, VOCABULARY = 8, 6, 32
MESHES: dict[str, dict[str, int]] = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "context": {"data": 2, "context": 2, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"model_type": "llama", "num_key_value_heads": 2, "head_dim": 8, **_SIZES}, "causal-lm"),
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
        "causal-lm",
    ),
    "bert": ({"model_type": "bert", "type_vocab_size": 2, **_SIZES}, "sequence-classification"),
    "t5": (
        {
            "model_type": "t5",
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_decoder_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        "seq2seq-lm",
    ),
}
CONFIGS["llama-nf4"] = CONFIGS["llama"]
# Where the zoo's configuration is made for another model.
METHODS: dict[str, jpeft.Method] = {
    **{name: entry.method for name, entry in zoo.METHODS.items()},
    "bitfit": jpeft.BitFit(),
    "norm_tuning": jpeft.NormTuning(),
    "drop_adapters": jpeft.compose(jpeft.Pfeiffer(bottleneck_size=4), jpeft.DropAdapters(layers=[0])),
    "houlsby": jpeft.Houlsby(bottleneck_size=6),
    "unipelt": jpeft.UniPELT(num_virtual_tokens=3, hidden_size=7, rank=2, bottleneck_size=6),
}
ON = {"bitfit": "bert"}  # the Llama has no biases


# One for each way in which arrays of a method lie on a mesh: both sides of a layer and vectors of it, vectors alone,
# an adapter with a width of its own, heads, and whole.
KINDS = ("dora", "ia3", "parallel_adapter", "p_tuning_v2", "prompt_tuning", "bitfit")


def _cases() -> list[tuple[str, str, str]]:
    everything = [(mesh, ON.get(name, "llama"), name) for name in METHODS for mesh in MESHES]
    everything += [(mesh, model, "lora") for model in CONFIGS if model != "llama" for mesh in MESHES]
    everything.remove(("fsdp", "llama-nf4", "lora"))  # 16 inputs are no 8 shards of whole blocks
    if os.environ.get("JPEFT_MESHES") == "all":
        return everything
    chosen = [("all", ON.get(name, "llama"), name) for name in KINDS]
    chosen += [("all", model, "lora") for model in ("t5", "llama-nf4")] + [(mesh, "llama", "lora") for mesh in MESHES]
    return [case for case in everything if case in chosen]


@functools.cache
def base_of(name: str) -> Any:
    config, task = CONFIGS[name]
    model = jpeft.models.from_config(config, task=task, rngs=nnx.Rngs(0))
    form = jpeft.NF4(block_size=4, targets=["q_proj", "down_proj"])
    return form(model) if name.endswith("nf4") else model


@functools.cache
def program(model: str, name: str) -> tuple[Any, Any, Any, Any]:
    """(partition, optimizer, step, results of the step on one device)."""
    adapted = METHODS[name](base_of(model), rngs=nnx.Rngs(1))
    parts = jpeft.partition(adapted)
    parts = parts._replace(adapter=zoo.trained(parts))
    # Momentum and not Adam, whose first step is the sign of the gradient: rounding would decide where that is 0.
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(adapter: Any, state: Any, buffers: Any, frozen: Any, batch: Any) -> Any:
        def loss(adapter: Any) -> Any:
            made = jpeft.combine(parts.graphdef, adapter, buffers, frozen)
            y = made(**batch)
            return jnp.mean(y**2) + jpeft.penalty(made), y

        (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return y, gradient, optax.apply_updates(adapter, updates), state

    compiled = jax.jit(step)
    return parts, optimizer, compiled, compiled(parts.adapter, optimizer.init(parts.adapter), *parts[2:], batch(model))


def batch(model: str) -> dict[str, jax.Array]:
    ids = jax.random.randint(jax.random.key(1), (ROWS, TIME), 1, VOCABULARY)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :3]} if model == "t5" else {"input_ids": ids}


@pytest.mark.parametrize(("mesh_name", "model", "name"), _cases())
def test_a_mesh_computes_what_one_device_does(mesh_name: str, model: str, name: str) -> None:
    parts, optimizer, step, expected = program(model, name)
    mesh = jpeft.make_mesh(**MESHES[mesh_name])
    placed = jpeft.partition(jpeft.shard(jpeft.combine(*parts), mesh))
    where = jpeft.shardings(jpeft.combine(*parts), mesh)
    for part, at in zip(placed[1:], where, strict=True):
        assert {key: value.sharding for key, value in part.items()} == at
    states = jpeft.optimizer_shardings(optimizer, placed.adapter, where.adapter)
    state = jax.jit(optimizer.init, out_shardings=states)(placed.adapter)
    made = step(placed.adapter, state, placed.buffers, placed.frozen, jpeft.shard_batch(batch(model), mesh))
    for found, wanted in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        assert zoo.relative(found, wanted) < 1e-5 or jnp.allclose(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["lora", "p_tuning_v2"])
def test_tokens_are_cut_along_context(name: str) -> None:
    adapted = METHODS[name](base_of("llama"), rngs=nnx.Rngs(1))
    mesh = jpeft.make_mesh(data=2, context=4)
    ids = jax.random.randint(jax.random.key(1), (ROWS, 20), 1, VOCABULARY)
    mask = jnp.ones_like(ids).at[:, :3].set(0)

    def run(model: Any, ids: jax.Array, mask: jax.Array) -> Any:
        parts = jpeft.partition(model)

        def loss(adapter: Any) -> Any:
            made = jpeft.combine(parts.graphdef, adapter, *parts[2:])
            return causal_lm_loss(made, ids, attention_mask=mask, block=64)[0], made.hidden(ids, mask)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(parts.adapter)

    alone = run(adapted, ids, mask)
    spread = run(jpeft.shard(adapted, mesh), *jpeft.shard_batch((ids, mask), mesh))
    for found, wanted in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        assert zoo.relative(found, wanted) < 1e-5
    hidden = spread[0][1]
    assert hidden.sharding.shard_shape(hidden.shape) == (ROWS // 2, 20 // 4, 16)


def test_the_cases_are_all_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    assert METHODS.keys() == zoo.METHODS.keys() == jpeft.METHODS.keys()
    assert {"lora", *KINDS} == {name for _, _, name in _cases()} or os.environ.get("JPEFT_MESHES") == "all"
    monkeypatch.setenv("JPEFT_MESHES", "all")
    assert {(mesh, name) for mesh, _, name in _cases()} == {(mesh, name) for mesh in MESHES for name in METHODS}
