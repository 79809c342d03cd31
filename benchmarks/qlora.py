"""What a quantised base costs and saves: bits, memory, time and quality, beside the same model unquantised.

    python benchmarks/qlora.py                    # everything but training, on random weights
    python benchmarks/qlora.py --model FILE.gguf  # errors and perplexity of a real model (a folder or hub id as well)

bits: of the linear layers, from the arrays. error: relative Frobenius norm over all of them. perplexity: of a text
(--text, by default this repository's documentation), with all weights in float32 but for what is quantised.
temporaries: what the compiled LoRA step needs beside its arguments and results, no layer rematerialised. time: LoRA's
forward pass and step relative to those on the unquantised base, medians of interleaved rounds. With --train STEPS and
--model: the perplexity of held-out windows after LoRA on the others, on the unquantised base and on NF4, for each of
--seeds. With --plan 8B 70B: what a step of LoRA needs on Llama 3.1 of that size, compiled without any array.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jpeft
from jpeft.losses import causal_lm_loss
from jpeft.quant import QuantizedLinear
from jpeft.surgery import modules

FORMATS: dict[str, Any] = {
    "NF4": jpeft.NF4(),
    "NF4, single": jpeft.NF4(double_quant=False),
    "FP4": jpeft.FP4(),
    "Int4, symmetric": jpeft.Int4(),
    "Int4": jpeft.Int4(symmetric=False),
    "Int8": jpeft.Int8(),
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
WINDOW = 256
LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SIZES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def make(depth: int, form: Any = None, *, adapted: bool = True) -> Any:
    """A random Llama of `depth` layers, its linear layers quantised, with LoRA on them."""
    model = jpeft.models.from_config({**LLAMA, "num_hidden_layers": depth}, task="causal-lm", rngs=nnx.Rngs(0))
    model = model if form is None else form(model)
    return jpeft.LoRA(rank=8)(model, rngs=0) if adapted else model


def step_of(graphdef: Any, *, backward: bool) -> Callable[..., Any]:
    """The loss of (adapter, buffers, frozen, ids), or its gradient."""

    def loss(adapter: Any, buffers: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        total, count = causal_lm_loss(jpeft.combine(graphdef, adapter, buffers, frozen), ids)
        return total / count

    return jax.jit(jax.grad(loss) if backward else loss)


def memory(depths: list[int]) -> None:
    """Temporaries of the step by number of layers."""
    print("layers | float32: temporaries MiB | NF4: temporaries MiB | NF4: base MiB | float32: base MiB")
    print("---|---|---|---|---")
    for depth in depths:
        cells = []
        for form in (None, jpeft.NF4()):
            graphdef, *arrays = jpeft.partition(nnx.eval_shape(functools.partial(make, depth, form)))
            ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)
            compiled = step_of(graphdef, backward=True).lower(*arrays, ids).compile()
            held = sum(a.size * a.dtype.itemsize for key, a in arrays[2].items() if key.startswith("layers/"))
            cells.append((compiled.memory_analysis().temp_size_in_bytes / 2**20, held / 2**20))
        (dense, dense_base), (packed, packed_base) = cells
        print(f"{depth} | {dense:.1f} | {packed:.1f} | {packed_base:.1f} | {dense_base:.1f}")


def times(rounds: int, rows: int, length: int) -> None:
    """Forward pass and step relative to the unquantised base."""
    ids = jax.random.randint(jax.random.key(1), (rows, length), 0, LLAMA["vocab_size"])
    runs: dict[tuple[str, bool], Callable[[], Any]] = {}
    for name, form in {"float32": None, **FORMATS}.items():
        graphdef, *arrays = jpeft.partition(make(4, form))
        for backward in (False, True):
            step = step_of(graphdef, backward=backward)
            runs[name, backward] = lambda step=step, arrays=arrays: jax.block_until_ready(step(*arrays, ids))
            runs[name, backward]()
    taken: dict[tuple[str, bool], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            taken[key].append(time.perf_counter() - start)
    middle = {key: statistics.median(values) for key, values in taken.items()}
    print(f"{rows} x {length} tokens, 4 layers of 512 | forward | forward and backward\n---|---|---")
    for name in ("float32", *FORMATS):
        print(f"{name} | " + " | ".join(f"{middle[name, b] / middle['float32', b]:.2f}" for b in (False, True)))


def text_of(paths: list[Path]) -> str:
    """The text whose perplexity is measured."""
    root = Path(__file__).parents[1]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths or sorted((root / "docs").glob("*.md")))


def windows_of(source: str, text: list[Path], count: int) -> np.ndarray:
    """The first `count` windows of tokens, [count, WINDOW]."""
    ids = jpeft.models.load_tokenizer(source)(text_of(text))["input_ids"]
    return np.array(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)[:count]


def perplexity(model: Any, windows: np.ndarray) -> float:
    """exp of the mean loss over windows [n, WINDOW] of tokens."""
    graphdef, *arrays = jpeft.partition(model)
    count = jax.jit(lambda ids, *arrays: causal_lm_loss(jpeft.combine(graphdef, *arrays), ids))
    sums = [count(jnp.asarray(window[None]), *arrays) for window in windows]
    return float(np.exp(sum(float(total) for total, _ in sums) / sum(float(n) for _, n in sums)))


def training(base: Any, windows: np.ndarray, steps: int, seeds: list[int]) -> None:
    """Perplexity of every fourth window after LoRA on the others: unquantised base, and NF4."""
    held, rest = windows[::4], np.delete(windows, np.s_[::4], axis=0)
    optimizer = optax.adam(5e-4)
    print(f"{steps} steps on {len(rest)} windows | before | " + " | ".join(f"seed {seed}" for seed in seeds))
    print("---|---" + "|---" * len(seeds))
    for name, model in {"LoRA": base, "NF4 + LoRA": jpeft.NF4()(base)}.items():
        scores = [perplexity(model, held)]
        compiled = None
        for seed in seeds:
            graphdef, adapter, buffers, frozen = jpeft.partition(jpeft.LoRA(rank=8)(model, rngs=seed))
            compiled = compiled or step_of(graphdef, backward=True)
            state, order = optimizer.init(adapter), np.random.default_rng(seed)
            for _ in range(steps):
                ids = jnp.asarray(rest[order.choice(len(rest), 2, replace=False)])
                updates, state = optimizer.update(compiled(adapter, buffers, frozen, ids), state)
                adapter = optax.apply_updates(adapter, updates)
            scores.append(perplexity(jpeft.combine(graphdef, adapter, buffers, frozen), held))
        print(f"{name} | " + " | ".join(f"{score:.3f}" for score in scores))


def plan(sizes: list[str]) -> None:
    """Base and temporaries of a step on one row of 2,048 tokens: bfloat16, rematerialised, LoRA of rank 16."""
    print("model | base: bfloat16, GiB | base: NF4, GiB | temporaries of the step on NF4, GiB\n---|---|---|---")
    for size in sizes:

        def model(form: Any, size: str = size) -> Any:
            config = {**LLAMA_3, **SIZES[size]}
            base = jpeft.models.from_config(config, task="causal-lm", dtype="bfloat16", remat=True, rngs=nnx.Rngs(0))
            return jpeft.LoRA(rank=16)(base if form is None else form(base), rngs=0)

        dense, packed = (jpeft.partition(nnx.eval_shape(lambda f=form: model(f))) for form in (None, jpeft.NF4()))
        held = [sum(a.size * a.dtype.itemsize for a in parts.frozen.values()) / 2**30 for parts in (dense, packed)]
        ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
        compiled = step_of(packed.graphdef, backward=True).lower(*packed[1:], ids).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**30
        print(f"{size} | {held[0]:.1f} | {held[1]:.1f} | {temporaries:.1f}")


def quality(base: Any, tokens: np.ndarray | None) -> None:
    """Bits, error and, of a real model, perplexity by format."""
    print("format | bits per weight | relative error | perplexity\n---|---|---|---")
    bfloat16 = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), nnx.state(base))
    dense = {"float32": base, "bfloat16": nnx.merge(nnx.graphdef(base), bfloat16)}
    for name, form in {"float32": None, "bfloat16": None, **FORMATS}.items():
        model = dense[name] if form is None else form(base)
        bits, error = {"float32": (32.0, 0.0), "bfloat16": (16.0, 0.0)}.get(name) or cost(base, model)
        score = "" if tokens is None else f"{perplexity(model, tokens):.3f}"
        print(f"{name} | {bits:.3f} | {error:.4f} | {score}")


def cost(base: Any, model: Any) -> tuple[float, float]:
    """Bits for each weight of the linear layers, and their relative error."""
    taken, count, off, norm = 0, 0, 0.0, 0.0
    originals = dict(modules(base))
    for path, module in modules(model):
        if isinstance(module, QuantizedLinear):
            kernel: Any = originals[path]
            wanted = kernel.kernel.get_value()
            taken, count = taken + module.quantized.nbytes, count + wanted.size
            off += float(jnp.sum((module.dense_weight() - wanted) ** 2))
            norm += float(jnp.sum(wanted**2))
    return 8 * taken / count, (off / norm) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--windows", type=int, default=16, help=f"how many windows of {WINDOW} tokens")
    parser.add_argument("--plan", nargs="+", choices=SIZES, default=[])
    parser.add_argument("--train", type=int, metavar="STEPS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs=2, default=[4, 128])
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    if args.plan:
        plan(args.plan)
        return
    base = make(4, adapted=False) if args.model is None else jpeft.models.load(args.model, dtype="float32")
    windows = None if args.model is None else windows_of(args.model, args.text, args.windows)
    if args.train:
        if windows is None:
            parser.error("--train needs --model")
        training(base, windows, args.train, args.seeds)
        return
    quality(base, windows)
    print()
    memory(args.layers)
    print()
    times(args.rounds, *args.tokens)


if __name__ == "__main__":
    main()
