"""Step time, step memory and inference time of every registered method, relative to LoRA and to the base.

    python benchmarks/methods.py                          # a BERT with a classifier
    python benchmarks/methods.py --model llama --only dora adalora --rounds 30

A random model of --depth layers of width --width, in float32; every method with its defaults on the model's own
targets, and rank 8 where it has one. step: loss, gradient and Adam's update of what trains, with the method's penalty
and its changes to the optimizer. temporaries: what the compiled step needs beside its arguments and results. inference:
a forward pass, baked where the method bakes; merged methods cost what the base does. Medians of rounds in which every
method takes one turn, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jpeft
from jpeft.losses import causal_lm_loss

SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "type_vocab_size": 2, "pad_token_id": 0},
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
}
WHOLE = {"bert": "intermediate.dense", "llama": "up_proj"}  # what full tuning trains, in the last layer
VOCABULARY = 1000


def make(model: str, width: int, depth: int) -> Any:
    """The random model."""
    config = {
        **SHAPES[model],
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 512,
    }
    if model == "llama":
        return jpeft.models.from_config(config, task="causal-lm", rngs=nnx.Rngs(0))
    return jpeft.models.from_config(
        config, task="sequence-classification", num_labels=2, pooling="mean", rngs=nnx.Rngs(0)
    )


def configured(model: str, depth: int) -> dict[str, jpeft.Method]:
    """Every registered method by its name; one that adds nothing of its own to a model is not among them."""
    special: dict[str, Callable[[], jpeft.Method]] = {
        "adapter_fusion": lambda: jpeft.AdapterFusion(adapter=jpeft.Pfeiffer(), tasks=3),
        "full_tuning": lambda: jpeft.FullTuning(targets=WHOLE[model], layers=[depth - 1]),
        "bitfit": lambda: jpeft.BitFit(new_biases=model == "llama"),
        "trainable_tokens": lambda: jpeft.TrainableTokens(tokens=range(10)),
    }
    methods = {}
    for name, kind in jpeft.METHODS.items():
        if name == "drop_adapters":
            continue
        method: Any = special.get(name, kind)()
        ranked = {field.name for field in dataclasses.fields(method)} >= {"rank"}
        methods[name] = dataclasses.replace(method, rank=8) if ranked else method
    return methods


@dataclasses.dataclass
class Measured:
    """One compiled model: how to run it, and what is known of it."""

    step: Callable[[], Any] | None
    forward: Callable[[], Any]
    temporaries: int = 0
    trainable: int = 0


def measured(model: Any, loss_of: Callable[[Any], jax.Array], run: Callable[[Any], Any], steps: int) -> Measured:
    """A method's step and forward pass, compiled. loss_of(model): the loss; run(model): what inference computes."""
    parts = jpeft.partition(model)
    baked = jpeft.partition(jpeft.bake(model)) if jpeft.applied(model) else parts
    forward = jax.jit(lambda *arrays: run(jpeft.combine(baked.graphdef, *arrays)))
    if not parts.adapter:
        return Measured(None, lambda: forward(*baked[1:]))
    tx = jpeft.optimizer(model, optax.adam(1e-4), total_steps=steps)

    def step(adapter: Any, state: Any, buffers: Any, frozen: Any, key: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            model = jpeft.combine(parts.graphdef, adapter, buffers, frozen, dropout=key)
            return loss_of(model) + jpeft.penalty(model)

        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    # Copies: the step donates them, and the base's arrays may be among those that a method starts from.
    held = [jax.tree.map(jnp.copy, tree) for tree in (parts.adapter, tx.init(parts.adapter))]
    rest = (parts.buffers, parts.frozen, jax.random.key(0))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*held, *rest).compile()

    def one() -> Any:
        adapter, state, value = compiled(*held, *rest)
        held[:] = adapter, state
        return value

    memory = compiled.memory_analysis().temp_size_in_bytes
    return Measured(one, lambda: forward(*baked[1:]), memory, sum(v.size for v in parts.adapter.values()))


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if number >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="bert")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="names of methods; LoRA is always there")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    base = make(args.model, args.width, args.depth)
    ids = jax.random.randint(jax.random.key(1), (args.rows, args.tokens), 1, VOCABULARY)

    def loss_of(model: Any) -> jax.Array:
        if args.model == "llama":
            total, count = causal_lm_loss(model, ids)
            return total / count
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(ids), ids[:, 0] % 2))

    def run(model: Any) -> Any:
        return model(ids)

    chosen = configured(args.model, args.depth)
    if args.only:
        unknown = sorted(set(args.only) - set(chosen))
        if unknown:
            parser.error(f"--only {' '.join(unknown)}: choose from {', '.join(chosen)}")
        chosen = {name: method for name, method in chosen.items() if name in ("lora", *args.only)}
    ready = {"base": measured(base, loss_of, run, args.rounds + 2)}
    for name, method in chosen.items():
        ready[name] = measured(method(base, rngs=0), loss_of, run, args.rounds + 2)

    inference = timed({name: one.forward for name, one in ready.items()}, args.rounds)
    steps = timed({name: one.step for name, one in ready.items() if one.step is not None}, args.rounds)

    shape = f"{args.model}, {args.depth} layers of width {args.width}, {args.rows} x {args.tokens} tokens, float32"
    print(f"{shape}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"LoRA's step: {1e3 * steps['lora']:.0f} ms, {ready['lora'].temporaries / 2**20:.1f} MiB of temporaries\n")
    print("method | trained parameters | step, x LoRA | temporaries, x LoRA | inference, x base")
    print("---|---|---|---|---")
    for name in chosen:
        one = ready[name]
        cells = (steps[name] / steps["lora"], one.temporaries / ready["lora"].temporaries)
        forward = inference[name] / inference["base"]
        print(f"{name} | {one.trainable:,} | {cells[0]:.2f} | {cells[1]:.2f} | {forward:.2f}")


if __name__ == "__main__":
    main()
