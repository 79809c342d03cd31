"""A table of what a model holds: path, kind, shape, trainable, bytes; and totals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import nnx

from jpeft import kinds, surgery
from jpeft.partition import variables
from jpeft.variables import AdapterIds, DropoutKey, Frozen, Quantized, Trainable


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of the model. size: how many parameters it holds; of a packed weight, all are counted at its codes."""

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    bytes: int
    size: int

    def cells(self) -> tuple[str, ...]:
        """The columns of the printed table."""
        shape = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        return self.path, self.kind, shape, "yes" if self.trainable else "", f"{self.bytes:,}"


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` returns: rows, totals, and a printable table."""

    rows: tuple[Row, ...]

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(row.size for row in self.rows if row.trainable)

    @property
    def total(self) -> int:
        """Number of parameters."""
        return sum(row.size for row in self.rows)

    @property
    def trainable_bytes(self) -> int:
        """Bytes of what trains."""
        return sum(row.bytes for row in self.rows if row.trainable)

    @property
    def total_bytes(self) -> int:
        """Bytes of everything."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        head = ("path", "kind", "shape", "trainable", "bytes")
        table = [head, *(row.cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines.append(
            f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.3f}%), "
            f"{self.trainable_bytes:,} of {self.total_bytes:,} bytes"
        )
        return "\n".join(lines)


def describe(model: nnx.Module) -> Description:
    """Every array of `model` (which may be abstract) but dropout keys, in the order of its tree."""
    rows = []
    for key, path, variable in variables(model):
        if isinstance(variable, DropoutKey | AdapterIds):
            continue
        shape, dtype = tuple(variable.shape), variable.dtype
        owner: Any = surgery.get(model, path[:-1])
        kind = type(variable).__name__ if isinstance(variable, nnx.Variable) else "array"
        if isinstance(variable, Frozen):
            kind = f"{type(owner).__name__}, frozen"
        elif isinstance(variable, Trainable) or isinstance(owner, nnx.Module):
            kind = f"{type(owner).__name__}, {kind}"
        elements = math.prod(shape)
        if isinstance(variable, Quantized) and isinstance(owner, kinds.Packed):
            count = math.prod(owner.weight_shape()) if path[-1] == "codes" else 0
        else:
            count = elements
        nbytes = elements * dtype.itemsize
        rows.append(Row(key, kind, shape, str(dtype), isinstance(variable, Trainable), nbytes, count))
    return Description(tuple(rows))
