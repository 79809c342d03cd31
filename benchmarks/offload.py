"""What `offload` takes off a chip's memory, as the TPU compiler accounts for a step; no TPU is needed.

    pip install --target /tmp/libtpu libtpu
    PYTHONPATH=/tmp/libtpu python benchmarks/offload.py

A deep, narrow Llama in bfloat16 with LoRA on the queries, rows dealt out to the chips, layers recomputed in the
backward pass: most of its temporaries are the layers' inputs. Prints MiB per chip, with them and AdamW's moments on the
chip and in the host's memory.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a cloud machine for its metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jpeft
from jpeft.losses import causal_lm_loss
from train.placing import HOST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4, help="for each chip")
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    devices = np.array(topologies.get_topology_desc(options.topology, platform="tpu").devices)
    mesh = Mesh(devices.reshape(-1), ("data",))
    shape = f"{options.layers} layers of width {options.width}, {options.rows} rows of {options.length} tokens per chip"
    print(f"{options.topology}, {shape}; MiB per chip")
    print("| | arguments | temporaries | peak | arguments, host | temporaries, host |")
    print("|---|---|---|---|---|---|")
    for name, there in (("on the chip", False), ("offloaded", True)):
        memory = compiled(mesh, options, there).memory_analysis()
        fields = ("argument_size", "temp_size", "peak_memory", "host_argument_size", "host_temp_size")
        sizes = [getattr(memory, f"{field}_in_bytes") / 2**20 for field in fields]
        print(f"| {name} | {' | '.join(f'{size:.1f}' for size in sizes)} |", flush=True)


def compiled(mesh: Mesh, options: argparse.Namespace, there: bool) -> Any:
    """The compiled step."""
    config = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": options.width,
        "intermediate_size": 2 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 64,
        "num_key_value_heads": options.width // 64,
        "max_position_embeddings": options.length,
    }

    def make() -> Any:
        base = jpeft.models.from_config(config, task="causal-lm", dtype="bfloat16", remat=True, rngs=nnx.Rngs(0))
        return jpeft.LoRA(rank=4, targets=["q_proj"])(base, rngs=0)

    model = nnx.eval_shape(make)
    graphdef, adapter, buffers, frozen = jpeft.partition(jpeft.offload(model) if there else model)
    transform = optax.adamw(1e-3)

    def step(adapter: Any, state: Any, buffers: Any, frozen: Any, ids: jax.Array) -> Any:
        def loss(adapter: Any) -> jax.Array:
            total, count = causal_lm_loss(jpeft.combine(graphdef, adapter, buffers, frozen), ids)
            return total / count

        here = jax.device_put(state, jax.memory.Space.Device) if there else state
        updates, state = transform.update(jax.grad(loss)(adapter), here, adapter)
        return optax.apply_updates(adapter, updates), state

    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    state = jax.eval_shape(transform.init, adapter)
    lies = jax.tree.map(lambda like: whole.with_memory_kind(HOST) if there and like.ndim else whole, state)

    def placed(tree: Any, at: Any) -> Any:
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, at)

    arguments = [placed(tree, dict.fromkeys(tree, whole)) for tree in (adapter, buffers, frozen)]
    ids = jax.ShapeDtypeStruct((mesh.size * options.rows, options.length), jnp.int32, sharding=rows)
    run = jax.jit(step, donate_argnums=(0, 1), out_shardings=(dict.fromkeys(adapter, whole), lies))
    return run.lower(arguments[0], placed(state, lies), *arguments[1:], ids).compile()


if __name__ == "__main__":
    main()
