"""Codes and scales over a mesh: they follow the axes of the kernel they stand for, and no block lies on two shards."""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from jpeft.errors import JpeftError
from jpeft.quant.linear import QuantizedLinear


def partition_specs(layer: QuantizedLinear, kernel: PartitionSpec, mesh: Mesh) -> dict[str, PartitionSpec]:
    """The spec of each array of `layer`, by its name, for a kernel [in, out] that would have the spec `kernel`.

    kernel: of the two trailing axes; leading (layer) axes are not sharded. The 8-bit groups of doubly quantised scales
    run over the whole weight, so their few numbers are replicated.

    Raises JpeftError if an axis cannot be divided without cutting a block in two, naming the sizes that work.
    """
    along_in, along_out, *_ = (*kernel, None, None)
    shape = (layer.in_features, layer.out_features)
    block = getattr(layer.format, "block_size", None) or 1
    rowwise = layer.format.rowwise(shape)
    _check("in", along_in, layer.in_features // block if rowwise else 0, f"blocks of {block} inputs", mesh, layer)
    _check("out", along_out, layer.out_features if rowwise else 0, "output features", mesh, layer)
    leading = (None,) * (len(layer.weight_shape()) - 2)
    specs = {}
    for name in layer.arrays:
        axes: tuple[Any, ...]
        if name in ("scale_scales", "scale_offset") or not rowwise:
            axes = ()
        elif name == "scales" and getattr(layer.format, "block_size", 1) is None:
            axes = (along_out,)
        else:
            axes = (along_out, along_in)
        specs[name] = PartitionSpec(*leading, *axes)
    if layer.bias is not None:
        specs["bias"] = PartitionSpec(*leading, along_out)
    return specs


def _check(side: str, names: Any, parts: int, of: str, mesh: Mesh, layer: QuantizedLinear) -> None:
    if names is None:
        return
    axes = names if isinstance(names, tuple) else (names,)
    unknown = [axis for axis in axes if axis not in mesh.shape]
    if unknown:
        raise JpeftError(f"the mesh has axes {tuple(mesh.shape)}, not {unknown[0]!r}")
    size = math.prod(mesh.shape[axis] for axis in axes)
    if size == 1 or (parts and parts % size == 0):
        return
    what = f"a kernel [{layer.in_features}, {layer.out_features}] quantised as {layer.format}"
    if not parts:
        raise JpeftError(f"{what}: its rows are no whole blocks, so it cannot be sharded; choose another block_size")
    works = [divisor for divisor in range(1, parts + 1) if parts % divisor == 0]
    said = ", ".join(map(str, works[:12])) + (", ..." if len(works) > 12 else "")
    raise JpeftError(
        f"{what}: its {side} axis has {parts} {of}, which {size} shards along {axes} would cut; sizes that work: {said}"
    )
