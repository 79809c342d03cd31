"""What a training step takes on TPUs, from the TPU compiler itself; no TPU is needed.

    pip install --target /tmp/libtpu libtpu
    PYTHONPATH=/tmp/libtpu python benchmarks/tpu_compile.py                       # all, into docs/tpu.md
    PYTHONPATH=/tmp/libtpu python benchmarks/tpu_compile.py --shapes 8B --methods LoRA --topologies v5e:4x4 \
        --lengths 8192 32768                                                      # long texts

Models, batches and optimizer states are abstract: no array exists. A row that is made again replaces the one in the
file, the others stay.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a cloud machine for its metadata

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import topologies

import jpeft
from jpeft.losses import causal_lm_loss
from jpeft.sharding import batch_sharding
from train.flops import flops

# The sizes of Llama 3.2 1B, Llama 3.1 8B and 70B (Meta's config.json).
SHAPES: dict[str, dict[str, Any]] = {
    name: {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "tie_word_embeddings": name == "1B",
    }
    for name, width, inner, layers, heads in (
        ("1B", 2048, 8192, 16, 32),
        ("8B", 4096, 14336, 32, 32),
        ("70B", 8192, 28672, 80, 64),
    )
}
TENSOR = {"1B": 1, "8B": 1, "70B": 4}
LENGTH = 2048
# Chips and GiB of memory per chip, as the compiler has it.
TOPOLOGIES = {"v5e:4x4": 16, "v6e:4x4": 32, "v5p:2x2x2": 95}


def _quantised(model: Any) -> Any:
    return jpeft.NF4()(model)


METHODS: dict[str, tuple[Callable[[Any], Any], jpeft.Method]] = {
    "LoRA": (lambda model: model, jpeft.LoRA(rank=16, targets="all-linear")),
    "QLoRA": (_quantised, jpeft.LoRA(rank=16, targets="all-linear")),
    "prefix": (lambda model: model, jpeft.PTuningV2(num_virtual_tokens=128)),
    "adapters": (lambda model: model, jpeft.Pfeiffer(bottleneck_size=64)),
}


class Row(NamedTuple):
    """What one step takes."""

    shape: str
    method: str
    topology: str
    mesh: str
    tokens: str
    arguments: str
    temporaries: str
    fits: str
    teraflops: str
    seconds: str


HEADER = Row(
    "shape",
    "method",
    "chips",
    "mesh",
    "tokens per step",
    "weights and state, GiB per chip",
    "temporaries, GiB per chip",
    "fits",
    "TFLOP per chip",
    "compiled in, s",
)


def measure(shape: str, method: str, topology: str, length: int = LENGTH, context: int = 1) -> Row:
    """Compiles the training step: bfloat16, layers recomputed in the backward pass, one text per data shard, AdamW."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jpeft.make_mesh(data=1, fsdp=-1, context=context, tensor=TENSOR[shape], devices=devices)
    rows = mesh.shape["fsdp"]
    before, chosen = METHODS[method]

    def make() -> Any:
        rngs = nnx.Rngs(0)
        config = {**SHAPES[shape], "max_position_embeddings": length + 128}
        model = jpeft.models.from_config(config, task="causal-lm", dtype="bfloat16", remat=True, rngs=rngs)
        return chosen(before(model), rngs=nnx.Rngs(1))

    graphdef, adapter, buffers, frozen = jpeft.partition(jpeft.shard(nnx.eval_shape(make), mesh))
    optimizer = optax.adamw(1e-4)

    def step(adapter: Any, state: Any, buffers: Any, frozen: Any, ids: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            total, count = causal_lm_loss(jpeft.combine(graphdef, adapter, buffers, frozen), ids)
            return total / count

        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    where = {key: value.sharding for key, value in adapter.items()}
    states: Any = jpeft.optimizer_shardings(optimizer, adapter, where)
    shapes = jax.eval_shape(optimizer.init, adapter)
    state = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), shapes, states)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(where, states, None))
    start = time.perf_counter()
    traced = jitted.trace(adapter, state, buffers, frozen, ids)
    work = flops(traced.jaxpr.jaxpr) / len(devices) / 1e12
    lowered = traced.lower()
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    given = (shape, method, topology, sizes, f"{rows} x {length}")
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler refuses what does not fit, and says what it would have taken.
        said = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", str(error))
        if said is None:
            raise
        seconds = f"{time.perf_counter() - start:.0f}"
        return Row(*given, "", "", f"no: {said[1]} of {said[2]}", f"{work:.1f}", seconds)
    seconds = f"{time.perf_counter() - start:.0f}"
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = (n / 2**30 for n in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
    return Row(*given, f"{arguments:.2f}", f"{temporaries:.2f}", "yes", f"{work:.1f}", seconds)


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """The rows of the table in a file, by shape, method, topology, mesh and tokens."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [Row(*line) for line in cells if len(line) == len(HEADER) and line[0] in SHAPES]
    return {row[:5]: row for row in rows}


def page(rows: dict[tuple[str, ...], Row]) -> str:
    """docs/tpu.md."""
    names = ("jax", "flax", "libtpu")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    places = [list(part) for part in (SHAPES, METHODS, TOPOLOGIES)]

    def place(row: Row) -> tuple[int, ...]:
        kinds = (part.index(cell) for part, cell in zip(places, row, strict=False))
        return (*kinds, int(row.tokens.split(" x ")[1]))

    table = [HEADER, Row(*["---"] * len(HEADER)), *sorted(rows.values(), key=place)]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in table)
    return f"""# Training steps, compiled for TPUs

Written by `python benchmarks/tpu_compile.py` on {datetime.date.today()} with
{versions}. Every row is a whole training step (forward, backward, AdamW) that the
TPU compiler has compiled for a mesh of these chips; the memory is the compiler's own figure, and no step was run.
Weights are bfloat16, layers are recomputed in the backward pass, each data shard has one text of {LENGTH} tokens or of
as many as stand there, and attention is JAX's splash kernel, which `attention: auto` chooses on TPUs. LoRA has rank 16
on every linear layer, QLoRA the same on an NF4 base, prefix is 128 keys and values per layer, adapters are Pfeiffer's
of width 64.

{lines}

`fits` compares with what the compiler may use of a chip: about 16 GiB on v5e, 32 on v6e and 95 on v5p. FLOPs are
those of the matrix products, recomputed ones included, and of attention over the whole square of queries and keys. How
long a compilation took says little: the machine had other work to do. A row stays until it is made again, also where
the code has changed since.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--topologies", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[LENGTH], metavar="TOKENS", help="of each text")
    parser.add_argument("--context", type=int, default=1, help="chips over which the tokens of a text are dealt out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "tpu.md")
    args = parser.parse_args()
    rows = read(args.out)
    for topology in args.topologies:
        for shape in args.shapes:
            for method, length in itertools.product(args.methods, args.lengths):
                row = measure(shape, method, topology, length, args.context)
                print(" | ".join(row), flush=True)
                rows[row[:5]] = row
                args.out.write_text(page(rows))
                jax.clear_caches()


if __name__ == "__main__":
    main()
