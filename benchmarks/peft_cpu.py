"""A LoRA training step and greedy decoding on the CPU, beside Hugging Face PEFT and transformers in one run.

    python benchmarks/peft_cpu.py            # both tables, about ten minutes
    python benchmarks/peft_cpu.py --rounds 5 --only step

Every contestant is a process of its own with the same model weights, batch, dtype (float32), number of threads and
allocator settings; the parent asks them for steps in turns (A B C A B C ...), so that a slow minute of the machine hits
all alike. Compilation and the first four steps are not counted. Needs the `parity` extra (torch, peft).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,  # decoding never stops early
    "pad_token_id": 0,
}
RANK, BATCH, LENGTH = 8, 8, 128
PROMPT, NEW = 32, 96
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 4


def batch() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(1, LLAMA["vocab_size"], (BATCH, LENGTH))


# ---- contestants: each returns a function that does one unit of work, blocking until it is done ----


def jpeft_step(folder: str) -> Callable[[], None]:
    import jax
    import optax

    import jpeft
    from jpeft.losses import causal_lm_loss

    model = jpeft.LoRA(rank=RANK, targets=LINEARS)(jpeft.models.load(folder, dtype="float32"), rngs=0)
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    optimizer, ids = optax.adamw(1e-4), batch()

    def step(adapter: Any, state: Any, frozen: Any, ids: Any) -> Any:
        def loss(adapter: Any) -> Any:
            total, count = causal_lm_loss(jpeft.combine(graphdef, adapter, buffers, frozen), ids)
            return total / count

        gradient = jax.grad(loss)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    held = [jax.tree.map(lambda a: a.copy(), adapter), optimizer.init(adapter)]

    def run() -> None:
        held[:] = jitted(held[0], held[1], frozen, ids)
        jax.block_until_ready(held)

    return run


def products(folder: str) -> Callable[[], None]:
    """The base's matrix products of one step alone: forward, and backward with respect to activations."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rows, width, inner, vocabulary = (
        BATCH * LENGTH,
        LLAMA["hidden_size"],
        LLAMA["intermediate_size"],
        LLAMA["vocab_size"],
    )
    layers = LLAMA["num_hidden_layers"]
    shapes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    rng = np.random.default_rng(0)
    stacked = [jnp.asarray(rng.normal(size=(layers, *shape)).astype(np.float32)) for shape in shapes]
    head = jnp.asarray(rng.normal(size=(width, vocabulary)).astype(np.float32))
    inputs = {
        size: jnp.asarray(rng.normal(size=(rows, size)).astype(np.float32)) for size in (width, inner, vocabulary)
    }

    @jax.jit
    def all_products(stacked: Any, head: Any, inputs: Any) -> Any:
        def layer(total: Any, kernels: Any) -> Any:
            for kernel in kernels:
                made = inputs[kernel.shape[0]] @ kernel, inputs[kernel.shape[1]] @ kernel.T
                # The barrier keeps the compiler from computing only the elements that are looked at.
                forward, backward = jax.lax.optimization_barrier(made)
                total = total + forward[0, 0] + backward[0, 0]
            return total, None

        total = jax.lax.scan(layer, 0.0, tuple(stacked))[0]
        forward, backward = inputs[width] @ head, inputs[vocabulary] @ head.T
        return jax.lax.optimization_barrier((total, forward, backward))

    return lambda: jax.block_until_ready(all_products(stacked, head, inputs))


def _peft_model(folder: str) -> Any:
    import peft
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS))


def peft_step(folder: str, *, compiled: bool = False) -> Callable[[], None]:
    import torch

    model = _peft_model(folder)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    forward = torch.compile(model) if compiled else model
    ids = torch.tensor(batch())

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return run


def jpeft_decode(folder: str, rows: int) -> Callable[[], None]:
    import jax

    import jpeft

    model = jpeft.models.load(folder, dtype="float32")
    ids = batch()[:rows, :PROMPT]
    return lambda: jax.block_until_ready(jpeft.generate(model, ids, max_new_tokens=NEW))


def transformers_decode(folder: str, rows: int) -> Callable[[], None]:
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(batch()[:rows, :PROMPT])
    mask = torch.ones_like(ids)

    def run() -> None:
        with torch.no_grad():
            made = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert made.shape[1] == PROMPT + NEW

    return run


CONTESTANTS: dict[str, Callable[[str], Callable[[], None]]] = {
    "jpeft": jpeft_step,
    "peft": peft_step,
    "peft, torch.compile": lambda folder: peft_step(folder, compiled=True),
    "matrix products alone (JAX)": products,
    "jpeft.generate, 1 row": lambda folder: jpeft_decode(folder, 1),
    "transformers.generate, 1 row": lambda folder: transformers_decode(folder, 1),
    "jpeft.generate, 8 rows": lambda folder: jpeft_decode(folder, 8),
    "transformers.generate, 8 rows": lambda folder: transformers_decode(folder, 8),
}
STEP = list(CONTESTANTS)[:4]
DECODE = list(CONTESTANTS)[4:]


# ---- the parent ----


def work(name: str, folder: str) -> None:
    """A contestant's process: one timed unit per line on standard input."""
    run = CONTESTANTS[name](folder)
    for _ in range(WARM_UP):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def measure(names: list[str], folder: str, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds per unit of each contestant, in interleaved rounds."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_PLATFORMS": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, "--folder", folder, "--work"]
    workers = {
        name: subprocess.Popen(
            [*command, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for name in names
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    alive = {name: w for name, w in workers.items() if _line(w) == "ready"}
    for number in range(rounds):
        for name, worker in alive.items():
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            times[name].append(float(_line(worker)))
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    for worker in workers.values():
        worker.kill()
    return times


def _line(worker: Any) -> str:
    return worker.stdout.readline().strip()


def report(args: argparse.Namespace, folder: str) -> None:
    import transformers

    config = transformers.LlamaConfig(**LLAMA)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    total = sum(p.numel() for p in model.parameters())
    frozen = total - LLAMA["vocab_size"] * LLAMA["hidden_size"]  # a look-up multiplies nothing
    del model
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax", "torch", "peft", "transformers")
    )
    print(f"{_processor()}, {args.threads} threads, float32; {versions}")
    print(f"Llama of {total / 1e6:.1f}M parameters, LoRA rank {RANK} on all linear layers\n")
    if args.only != "decode":
        times = measure(STEP, folder, args.rounds, args.threads)
        flops = 4 * frozen * BATCH * LENGTH
        print(f"training step, {BATCH} x {LENGTH} tokens | median ms | minimum ms | against peft | GFLOP/s at 4NT")
        print("---|---|---|---|---")
        for name, seconds in times.items():
            _row(name, seconds, times["peft"], lambda s: f"{flops / s / 1e9:.0f}")
        if times["jpeft"] and times["matrix products alone (JAX)"]:
            share = statistics.median(times["matrix products alone (JAX)"]) / statistics.median(times["jpeft"])
            print(f"\nshare of jpeft's step spent in the base's matrix products: {share:.0%}\n")
    if args.only != "step":
        times = measure(DECODE, folder, max(3, args.rounds // 4), args.threads)
        print(f"greedy decoding, {PROMPT} + {NEW} tokens | median ms | minimum ms | against transformers | tokens/s")
        print("---|---|---|---|---")
        for name, seconds in times.items():
            rows = int(name.split(", ")[1].split()[0])
            _row(
                name,
                seconds,
                times[f"transformers.generate, {name.split(', ')[1]}"],
                lambda s, r=rows: f"{r * NEW / s:.0f}",
            )


def _row(name: str, seconds: list[float], reference: list[float], rate: Callable[[float], str]) -> None:
    if not seconds:
        print(f"{name} | did not start | | |")
        return
    median = statistics.median(seconds)
    against = f"{statistics.median(reference) / median:.2f}x" if reference else ""
    print(f"{name} | {median * 1e3:.0f} | {min(seconds) * 1e3:.0f} | {against} | {rate(median)}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24, help="interleaved rounds (default 24)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contestant (default 2)")
    parser.add_argument("--only", choices=["step", "decode"], help="one of the two tables")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        report(args, folder)


if __name__ == "__main__":
    main()
