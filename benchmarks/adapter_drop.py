"""AdapterDrop's speed: inference and training by the number of lower layers that go without adapters.

    python benchmarks/adapter_drop.py
    python benchmarks/adapter_drop.py --method houlsby --tokens 64 --dropped 0 3 6 9 12

A random BERT of --depth layers of width --width, in float32. inference: time of a forward pass relative to the base
without any adapter; share: how much of what the adapters cost is saved. step: the gradient of the adapters and the
classifier, relative to that with all adapters. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jpeft

METHODS: dict[str, Callable[..., jpeft.Method]] = {
    "houlsby": jpeft.Houlsby,
    "pfeiffer": jpeft.Pfeiffer,
    "parallel": jpeft.ParallelAdapter,
}


def make(width: int, depth: int) -> Any:
    """A random BERT with a classifier."""
    config = {
        "model_type": "bert",
        "vocab_size": 1000,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    return jpeft.models.from_config(
        config, task="sequence-classification", num_labels=2, pooling="mean", rngs=nnx.Rngs(0)
    )


def timed(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median seconds of each call, taken in turns."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forward(model: Any, ids: jax.Array) -> Callable[[], Any]:
    """A compiled forward pass."""
    parts = jpeft.partition(model)
    run = jax.jit(lambda *arrays: jpeft.combine(parts.graphdef, *arrays)(ids))
    return lambda: run(*parts[1:])


def gradient(model: Any, ids: jax.Array) -> Callable[[], Any]:
    """A compiled gradient of what trains."""
    parts = jpeft.partition(model)

    def loss(adapter: Any, buffers: Any, frozen: Any) -> jax.Array:
        return jnp.mean(jpeft.combine(parts.graphdef, adapter, buffers, frozen)(ids) ** 2)

    run = jax.jit(jax.grad(loss))
    return lambda: run(*parts[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="houlsby")
    parser.add_argument("--reduction-factor", type=float, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dropped", type=int, nargs="+", default=[0, 3, 6, 9, 12])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    base = make(args.width, args.depth)
    adapted = METHODS[args.method](reduction_factor=args.reduction_factor)(base, rngs=0)
    models = {n: jpeft.drop_adapters(adapted, range(n)) if n else adapted for n in args.dropped}
    ids = jax.random.randint(jax.random.key(1), (args.rows, args.tokens), 1, 1000)
    inference = timed({"base": forward(base, ids), **{n: forward(m, ids) for n, m in models.items()}}, args.rounds)
    steps = timed({n: gradient(m, ids) for n, m in models.items()}, args.rounds)

    first = args.dropped[0]
    print(f"{args.method}, reduction factor {args.reduction_factor:g}, {args.depth} layers of width {args.width},")
    print(f"{args.rows} rows of {args.tokens} tokens, {jax.devices()[0].device_kind}\n")
    print("layers dropped | inference, x base | of the adapters' cost saved | step, x all adapters")
    print("---|---|---|---")
    cost = inference[first] - inference["base"]
    for n in args.dropped:
        saved = (inference[first] - inference[n]) / cost if cost > 0 else float("nan")
        print(f"{n} | {inference[n] / inference['base']:.2f} | {saved:.0%} | {steps[n] / steps[first]:.2f}")


if __name__ == "__main__":
    main()
