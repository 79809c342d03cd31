"""A short training on a mesh, by processes of `test_processes`: `python -m tests.sharding.training NUMBER PORT FOLDER`.

Every process loads its slices of the model, gives its rows of the batch, trains three steps, saves the adapter together
with the others, and loads it again onto another mesh.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jpeft
from jpeft.losses import causal_lm_loss
from jpeft.models.tensors import SafetensorsFolder

PROCESSES, DEVICES = 2, 2  # devices of each process
ROWS, TIME, VOCABULARY = 4, 6, 32
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
METHOD = jpeft.LoRA(rank=2, targets="all-linear", dropout=0.25)


class Counted(np.ndarray):
    """A mapped tensor that notes how many bytes are taken out of it."""

    taken = 0

    def __getitem__(self, index: Any) -> Any:
        part = np.asarray(self)[index]
        Counted.taken += part.nbytes
        return part


def counting(read: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`SafetensorsFolder.read`, whose tensors count."""
    return lambda folder, name: read(folder, name).view(Counted)


def rows() -> np.ndarray:
    """The whole batch [B, T]."""
    return np.random.default_rng(0).integers(1, VOCABULARY, (ROWS, TIME))


def train(base: Any, mesh: Mesh, ids: np.ndarray) -> tuple[Any, list[float]]:
    """The adapted model after three steps, and the loss of each. ids: the rows of this process."""
    model = jpeft.shard(METHOD(base, rngs=nnx.Rngs(1)), mesh)
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    optimizer = optax.adam(1e-2)
    where = {key: value.sharding for key, value in adapter.items()}
    states: Any = jpeft.optimizer_shardings(optimizer, adapter, where)
    state = jax.jit(optimizer.init, out_shardings=states)(adapter)

    def step(adapter: Any, state: Any, buffers: Any, frozen: Any, ids: Any, key: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            total, count = causal_lm_loss(jpeft.combine(graphdef, adapter, buffers, frozen, dropout=key), ids)
            return total / count

        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(adapter, updates), state, value

    compiled = jax.jit(step, out_shardings=(where, states, NamedSharding(mesh, PartitionSpec())))
    batch, losses = jpeft.shard_batch(ids, mesh), []
    for number in range(3):
        key = jax.random.fold_in(jax.random.key(0), number)
        adapter, state, value = compiled(adapter, state, buffers, frozen, batch, key)
        losses.append(float(value))
    return jpeft.combine(graphdef, adapter, buffers, frozen), losses


def values(model: Any) -> dict[str, np.ndarray]:
    """The arrays of the adapter as a whole, gathered from all processes."""
    adapter = jpeft.partition(model).adapter
    whole = {key: NamedSharding(value.sharding.mesh, PartitionSpec()) for key, value in adapter.items()}
    gathered = jax.jit(lambda adapter: adapter, out_shardings=whole)(adapter)
    return {key: np.asarray(value.addressable_data(0)) for key, value in gathered.items()}


def main() -> None:
    number, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, number)
    mesh = jpeft.make_mesh(data=1, fsdp=2, tensor=2)
    read = SafetensorsFolder.read
    SafetensorsFolder.read = counting(read)  # type: ignore[method-assign]
    base = jpeft.models.load(folder / "model", mesh=mesh)
    SafetensorsFolder.read = read  # type: ignore[method-assign]
    held = {
        key: sum(shard.data.nbytes for shard in value.addressable_shards)
        for key, value in jpeft.partition(base).frozen.items()
    }
    own = ROWS // PROCESSES
    model, losses = train(base, mesh, rows()[number * own : (number + 1) * own])
    jpeft.save_adapter(folder / "adapter", model)

    other = jpeft.make_mesh(data=2, fsdp=1, tensor=2)
    again = jpeft.load_adapter(folder / "adapter", jpeft.models.load(folder / "model", mesh=other))
    for key, value in values(jpeft.shard(again, other)).items():
        assert np.array_equal(value, values(model)[key]), key
    print(json.dumps({"losses": losses, "held": held, "read": Counted.taken}))


if __name__ == "__main__":
    main()
