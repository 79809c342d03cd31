"""Compile time and step memory by number of layers: a stack is compiled as one layer, however many it holds.

    python benchmarks/layers.py              # 4, 8, 16, 32 layers, stacked and as a plain list

The model is abstract (no array exists); the step is a LoRA training step with rematerialised layers. `temporaries` is
what the compiled step needs beside its arguments and results.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jpeft
from jpeft.losses import causal_lm_loss

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
BATCH, LENGTH = 4, 256


def compile_step(depth: int, *, stacked: bool) -> tuple[float, int]:
    """(seconds to compile, bytes of temporaries) of the step of a model of `depth` layers."""

    def make() -> Any:
        config = {**LLAMA, "num_hidden_layers": depth}
        model = jpeft.models.from_config(config, task="causal-lm", remat=stacked, rngs=nnx.Rngs(0))
        if not stacked:
            model.layers = model.layers.unstack()
        return jpeft.LoRA(rank=8)(model, rngs=nnx.Rngs(0))

    graphdef, adapter, buffers, frozen = jpeft.partition(nnx.eval_shape(make))

    def step(adapter: Any, buffers: Any, frozen: Any, ids: jax.Array) -> Any:
        def loss(adapter: Any) -> jax.Array:
            total, count = causal_lm_loss(jpeft.combine(graphdef, adapter, buffers, frozen), ids)
            return total / count

        return jax.value_and_grad(loss)(adapter)

    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    lowered = jax.jit(step).lower(adapter, buffers, frozen, ids)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    return seconds, compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    args = parser.parse_args()
    one_input = BATCH * LENGTH * LLAMA["hidden_size"] * 4 / 2**20
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; LoRA step, {BATCH} x {LENGTH} tokens, float32")
    print(f"one layer's input is {one_input:.1f} MiB\n")
    print("layers | stacked: compile s | temporaries MiB | list: compile s | temporaries MiB")
    print("---|---|---|---|---")
    for depth in args.layers:
        cells = [
            f"{s:.2f} | {b / 2**20:.1f}" for s, b in (compile_step(depth, stacked=stacked) for stacked in (True, False))
        ]
        print(f"{depth} | {' | '.join(cells)}")


if __name__ == "__main__":
    main()
