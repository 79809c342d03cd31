"""A product with an NF4 weight on a TPU, by the TPU compiler's own reckoning; no TPU is needed, and nothing runs.

    pip install --target /tmp/libtpu --no-deps libtpu
    PYTHONPATH=/tmp/libtpu python benchmarks/dequantise_tpu.py

Cycles are what the compiler estimates of XLA's operations, and for the kernel the instructions of its schedule times
the steps of its grid.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a cloud machine for its metadata
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={tempfile.mkdtemp()} --xla_jf_dump_llo_text=true"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jpeft
from jpeft.quant import fused

SIZE = 4096
DUMP = Path(os.environ["LIBTPU_INIT_ARGS"].split()[0].partition("=")[2])  # where the compiler writes its schedules


def _xla(platform: str) -> Callable[[Any, Any], Any]:
    return lambda x, kernel: x @ kernel.weight(platform).astype(x.dtype).T


FORMS = {"XLA, as on CPUs": _xla("cpu"), "XLA, as on TPUs": _xla("tpu"), "kernel": fused.product}


def cycles(compiled: Any) -> int:
    """Those of XLA's operations, and of a kernel."""
    total = sum(map(int, re.findall(r'"estimated_cycles":"?(\d+)', compiled.as_text())))
    for path in DUMP.glob("*schedule-analysis_final_bundles.txt"):
        text = path.read_text()
        if "tpu_custom_call" in text:
            found = re.search(r"total scheduled bundles:\s+(\d+)", text)
            assert found is not None
            total += int(found[1]) * (SIZE // fused.OUTPUTS) * (SIZE // fused.INPUTS)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 256], help="2048 takes minutes")
    parser.add_argument("--topology", default="v5e:2x2")
    args = parser.parse_args()
    device = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices[:1]
    at = NamedSharding(Mesh(np.array(device), ("x",)), PartitionSpec())

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=at), tree)

    whole = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)
    kernel = placed(jax.eval_shape(jpeft.NF4(double_quant=False).quantize, whole))
    print(f"{SIZE} x {SIZE}, {args.topology}, jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}")
    print("| rows | form | thousands of cycles | temporaries, MiB | compiled in, s |\n| --- | --- | --- | --- | --- |")
    for rows in args.rows:
        x = placed(jax.ShapeDtypeStruct((rows, SIZE), jnp.bfloat16))
        ways = {name: (form, kernel) for name, form in FORMS.items()} | {
            "a bfloat16 weight": (jnp.matmul, placed(whole))
        }
        for name, (form, weight) in ways.items():
            if name == "kernel" and rows > fused.MOST_ROWS:
                continue
            for path in DUMP.iterdir():
                path.unlink()
            lowered, start = jax.jit(form).lower(x, weight), time.perf_counter()
            compiled = lowered.compile()
            seconds = time.perf_counter() - start
            memory: Any = compiled.memory_analysis()
            found = f"{cycles(compiled) / 1e3:.0f} | {memory.temp_size_in_bytes / 2**20:.0f}"
            print(f"| {rows} | {name} | {found} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
