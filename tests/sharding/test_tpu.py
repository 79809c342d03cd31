"""What the TPU compiler makes of a training step on a mesh; libtpu is needed, a TPU is not."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jpeft
from jpeft.losses import causal_lm_loss
from jpeft.quant import fused
from jpeft.sharding import batch_sharding
from tests.sharding.test_collectives import INNER, TENSOR, VOCABULARY, WIDTH, compiled_step


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.devices()  # the CPU's take the flags of the tests before they are gone
    monkeypatch.delenv("XLA_FLAGS")  # at a flag that it does not know libtpu ends the process, when it first compiles
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is locked: no chip is used


def _chips(topology: str) -> Any:
    """The devices of a topology that is not here."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@pytest.mark.parametrize("quantise", [False, True], ids=["plain", "nf4"])
def test_weights_are_gathered_layer_by_layer(quantise: bool) -> None:
    devices = _chips("v5e:2x4")
    text = compiled_step(quantise=quantise, devices=devices).as_text()
    found = re.findall(r" = (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    sizes = {(dtype, math.prod(map(int, dims.split(",")))) for dtype, dims in found}
    floats = {size for dtype, size in sizes if dtype in ("f32", "bf16")}
    kernel, head = WIDTH * INNER // TENSOR, WIDTH * VOCABULARY // TENSOR
    if quantise:
        # Kernels come as bytes of two codes; as floats only the head, LoRA's factors and the scales of blocks.
        assert ("u8", kernel // 2) in sizes or ("s8", kernel // 2) in sizes
        assert max(floats - {head}) < kernel // 2
    else:
        assert {kernel, head} <= floats
        assert max(floats - {head}) == kernel


@pytest.mark.parametrize("name", ["plain", "prefix", "windows", "context"])
def test_no_array_of_all_pairs_of_tokens(name: str) -> None:
    devices = _chips("v5e:2x2")
    axes = {"context": 2} if name == "context" else {"fsdp": 2}
    mesh = jpeft.make_mesh(data=1, **axes, tensor=2, devices=devices)
    config = {
        "model_type": "qwen2" if name == "windows" else "llama",
        "vocab_size": 128,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 40_000,
        **({"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 1} if name == "windows" else {}),
    }
    method = jpeft.PTuningV2(num_virtual_tokens=20) if name == "prefix" else jpeft.LoRA(rank=2)

    def make() -> Any:
        model = jpeft.models.from_config(config, task="causal-lm", dtype="bfloat16", remat=True, rngs=nnx.Rngs(0))
        return method(model, rngs=nnx.Rngs(1))

    graphdef, adapter, buffers, frozen = jpeft.partition(jpeft.shard(nnx.eval_shape(make), mesh))

    def loss(adapter: Any, buffers: Any, frozen: Any, ids: Any, mask: Any) -> jax.Array:
        return causal_lm_loss(jpeft.combine(graphdef, adapter, buffers, frozen), ids, attention_mask=mask)[0]

    tokens = 8192
    ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32, sharding=batch_sharding(mesh))
    compiled = jax.jit(jax.grad(loss)).lower(adapter, buffers, frozen, ids, ids).compile()
    assert "tpu_custom_call" in compiled.as_text()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < tokens**2  # a byte for each pair of tokens, of one head


@pytest.mark.parametrize("form", [jpeft.NF4(double_quant=False), jpeft.Int4(symmetric=False)], ids=str)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_the_kernel_for_few_rows_compiles(topology: str, form: Any) -> None:
    at = NamedSharding(Mesh(np.array(_chips(topology)[:1]), ("x",)), PartitionSpec())
    kernel = jax.eval_shape(lambda: form.quantize(jnp.zeros((2048, 768), jnp.bfloat16)))
    x, kernel = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=at),
        (jax.ShapeDtypeStruct((3, 2048), jnp.bfloat16), kernel),
    )
    assert fused.takes(3, x.dtype, kernel)
    compiled = jax.jit(fused.product).lower(x, kernel).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert not re.search(r"bf16\[(2048,768|768,2048)\]", compiled.as_text())  # no dequantised weight
