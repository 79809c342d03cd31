"""What moves between devices in a compiled training step, counted in its HLO and compared with what the layout needs.

Of a weight that is cut along `fsdp`, each layer is gathered where it is used: once in the forward pass and once in the
backward pass, each time the part that stays cut along `tensor`. The frozen head is gathered once, because the loss
computes its gradient where it computes the logits. Nothing else of the base moves, and rows stay where they are.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jpeft
from jpeft.losses import causal_lm_loss
from jpeft.sharding import batch_sharding

LAYERS, WIDTH, INNER, VOCABULARY, ROWS, TIME, RANK, BLOCK = 3, 64, 192, 256, 16, 20, 2, 8
FSDP, TENSOR = 4, 2
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": TIME,
}
KERNELS = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER  # numbers in one layer's kernels


class Move(NamedTuple):
    """One array that a collective gives to each device. times: how often in a step."""

    operation: str
    dtype: str
    shape: tuple[int, ...]
    times: int

    @property
    def nbytes(self) -> int:
        width = 1 if self.dtype in ("pred", "u8", "s8") else int(self.dtype.lstrip("suf")) // 8
        return self.times * width * math.prod(self.shape)


def moves(hlo: str) -> list[Move]:
    """The collectives of a compiled program; what is in the body of a loop counts as often as it runs.

    TPU programs do not say how often that is; there it counts once.
    """
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
        bodies.setdefault(name, []).append(line)

    def walk(name: str, times: int) -> list[Move]:
        found = []
        for line in bodies[name]:
            if loop := re.search(r" while\(.*body=%([\w.\-]+)", line):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                found += walk(loop[1], times * (int(trips[1]) if trips else 1))
            operation = re.search(r" = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter)(-start)?\(", line)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", operation[1]) if operation else ():
                assert operation
                shape = tuple(map(int, filter(None, dims.split(","))))
                found.append(Move(operation[2], dtype, shape, times))
        return found

    return walk(entry, 1)


def compiled_step(*, quantise: bool, devices: Any = None) -> Any:
    """A step of LoRA on every layer, with AdamW, compiled for an abstract model."""
    mesh = jpeft.make_mesh(data=1, fsdp=FSDP, tensor=TENSOR, devices=devices)

    def make() -> Any:
        model = jpeft.models.from_config(CONFIG, task="causal-lm", rngs=nnx.Rngs(0))
        model = jpeft.NF4(block_size=BLOCK)(model) if quantise else model
        return jpeft.LoRA(rank=RANK, targets="all-linear")(model, rngs=nnx.Rngs(1))

    graphdef, adapter, buffers, frozen = jpeft.partition(jpeft.shard(nnx.eval_shape(make), mesh))
    optimizer = optax.adamw(1e-3)

    def step(adapter: Any, state: Any, buffers: Any, frozen: Any, ids: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            total, count = causal_lm_loss(jpeft.combine(graphdef, adapter, buffers, frozen), ids)
            return total / count

        updates, state = optimizer.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    where = {key: value.sharding for key, value in adapter.items()}
    states: Any = jpeft.optimizer_shardings(optimizer, adapter, where)
    shapes = jax.eval_shape(optimizer.init, adapter)
    state = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), shapes, states)
    ids = jax.ShapeDtypeStruct((ROWS, TIME), jnp.int32, sharding=batch_sharding(mesh))
    return jax.jit(step, out_shardings=(where, states)).lower(adapter, state, buffers, frozen, ids).compile()


@pytest.fixture(scope="module")
def plain() -> list[Move]:
    return moves(compiled_step(quantise=False).as_text())


def gathers(found: list[Move], dtypes: tuple[str, ...] = ("f32", "u8")) -> list[Move]:
    return [move for move in found if move.operation == "all-gather" and move.dtype in dtypes]


def test_each_layer_is_gathered_where_it_is_used(plain: list[Move]) -> None:
    base = 2 * LAYERS * 4 * KERNELS // TENSOR + 4 * WIDTH * VOCABULARY // TENSOR
    # The side of LoRA's factors that lies along the features: one of each of the seven.
    adapter = 2 * LAYERS * 4 * 7 * WIDTH * RANK
    assert sum(move.nbytes for move in gathers(plain)) == base + adapter
    # Layer by layer: no gather holds more than one kernel.
    inner = [move for move in gathers(plain) if move.times == LAYERS]
    assert max(math.prod(move.shape) for move in inner) == WIDTH * INNER // TENSOR
    assert sum(move.nbytes for move in gathers(plain) if move.times != LAYERS) == 4 * WIDTH * VOCABULARY // TENSOR


def test_rows_stay_where_they_are(plain: list[Move]) -> None:
    own = ROWS // FSDP * TIME * WIDTH
    activations = [m for m in plain if m.times == LAYERS and m.operation == "all-reduce" and len(m.shape) == 3]
    assert activations
    assert {math.prod(move.shape[:2]) for move in activations} == {ROWS // FSDP * TIME}
    # Tensor parallelism adds up what each sublayer writes, and backwards the gradients of what each of q, k, v, gate
    # and up reads.
    assert sum(move.nbytes for move in activations if move.shape[-1] == WIDTH) == LAYERS * 4 * own * (2 + 5)


def test_embedding_moves_no_more_than_a_share_of_the_rows() -> None:
    mesh = jpeft.make_mesh(data=2, fsdp=2, tensor=2)
    config = {**CONFIG, "num_hidden_layers": 1}
    model = nnx.eval_shape(lambda: jpeft.models.from_config(config, task="causal-lm", rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(jpeft.shard(model, mesh))
    ids = jax.ShapeDtypeStruct((ROWS, TIME), jnp.int32, sharding=batch_sharding(mesh))
    hidden = jax.jit(lambda state, ids: nnx.merge(graphdef, state).hidden(ids))
    found = moves(hidden.lower(state, ids).compile().as_text())
    activations = [move for move in found if move.dtype == "f32" and len(move.shape) > 2]
    assert activations
    assert max(math.prod(move.shape) for move in activations) == ROWS // 4 * TIME * WIDTH


def test_a_quantised_base_moves_as_codes() -> None:
    found = gathers(moves(compiled_step(quantise=True).as_text()))
    layers = [move for move in found if move.times == LAYERS and RANK not in move.shape]
    codes = 2 * KERNELS // 2 // TENSOR
    # float32 scales as often as the codes, and before that once their bytes, in two steps that end with all of them.
    scales = (2 * 4 * KERNELS // TENSOR + KERNELS + KERNELS // 2) // BLOCK
    moved = sum(move.nbytes for move in layers)
    assert LAYERS * codes < moved <= LAYERS * (codes + scales)
    assert all(move.nbytes <= LAYERS * WIDTH * INNER // 2 for move in layers)
