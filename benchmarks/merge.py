"""What merging takes: time, and memory beside the model, in float32 and bfloat16, at once and on the way to the file.

    python benchmarks/merge.py
    python benchmarks/merge.py --width 2048 --layers 24

A random Llama with LoRA on every linear layer, its adapters at random. `jpeft.models.save(jpeft.merge(model), folder)`
holds the merged model beside the model; `jpeft.models.save_merged(model, folder)` a weight of one layer. Each in a
process of its own: seconds with the file written, in --rounds repetitions of which the median counts, and the most
memory that the process held beyond what it had before (Linux).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import jpeft


def adapted(dtype: str, options: argparse.Namespace) -> Any:
    """The model, nothing in its adapters at its initial value."""
    config = {
        "model_type": "llama",
        "vocab_size": 8000,
        "hidden_size": options.width,
        "intermediate_size": 3 * options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 64,
        "max_position_embeddings": 2048,
    }
    model = jpeft.models.from_config(config, task="causal-lm", dtype=dtype, rngs=nnx.Rngs(0))
    parts = jpeft.partition(jpeft.LoRA(rank=options.rank, targets="all-linear")(model, rngs=0))
    keys = jax.random.split(jax.random.key(1), len(parts.adapter))
    pairs = zip(keys, parts.adapter.items(), strict=True)
    values = {name: 0.02 * jax.random.normal(key, value.shape) for key, (name, value) in pairs}
    return jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen)


def held(kind: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most since the last reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)) * 1024


def measure(dtype: str, streamed: bool, options: argparse.Namespace) -> tuple[int, float, int, Any]:
    """(bytes of the model, median seconds, bytes beyond what was held before, rounding)."""
    model = adapted(dtype, options)
    size = sum(value.nbytes for value in jax.block_until_ready(jpeft.partition(model).frozen).values())
    seconds, most, rounding = [], 0, None
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            before = held("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
            begin = time.perf_counter()
            if streamed:
                rounding = jpeft.models.save_merged(model, folder)
            else:
                jpeft.models.save(jpeft.merge(model), folder)
            seconds.append(time.perf_counter() - begin)
            most = max(most, held("VmHWM") - before)
    return size, statistics.median(seconds), most, rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"a Llama of {options.layers} layers of width {options.width}, LoRA of rank {options.rank} on all of them\n")
    print("| | model, MiB | merged at once, s | memory beside, MiB | on the way, s | memory beside, MiB |")
    print("|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        cells, rounding = [], None
        for streamed in (False, True):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                size, seconds, most, rounding = alone.submit(measure, dtype, streamed, options).result()
            cells += [f"{seconds:.1f}", f"{most / 2**20:.0f}"]
        print(f"| {dtype} | {size / 2**20:.0f} | {' | '.join(cells)} |", flush=True)
    print(f"\n{rounding}")


if __name__ == "__main__":
    main()
