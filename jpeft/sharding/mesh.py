"""The mesh, and batches over it.

data      rows of the batch; weights are whole on each
fsdp      rows of the batch as well; each weight is cut along one axis and gathered where it is used
context   the tokens of each row; keys and values are gathered where they are attended to
tensor    each weight is cut along another axis, and so are the products (Shoeybi et al. 2019, arXiv:1909.08053)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jpeft.errors import JpeftError

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")  # the axes along which the rows of a batch are dealt out


def make_mesh(
    *, data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `context` and `tensor`, of which one may be -1: what the others leave.

    devices: default, all of them, of all processes. Neighbours along `tensor` are neighbours in the machine.

    Raises JpeftError if the sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    count = len(devices) if devices is not None else jax.device_count()
    said = ", ".join(f"{name}={size}" for name, size in sizes.items())
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise JpeftError(f"mesh: {name}={size!r}; give a positive whole number, or -1 for what the others leave")
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise JpeftError(f"mesh: {' and '.join(open_axes)} are both -1; one axis can be left open")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and count % known == 0:
        sizes[open_axes[0]] = count // known
    elif open_axes or known != count:
        raise JpeftError(
            f"mesh: {said} do not make up the {count} devices (the given sizes multiply to {known}); choose sizes "
            f"whose product {'divides' if open_axes else 'is'} {count}, or leave one axis open with -1"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows along the data axes, all else whole."""
    axes = tuple(axis for axis in BATCH if axis in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch (any pytree of arrays [rows, ...]) dealt out along the data axes.

    With several processes each gives its own rows, and the batch is all of them together.

    Raises JpeftError if the rows cannot be dealt out evenly.
    """
    sharding = batch_sharding(mesh)
    shards = math.prod(mesh.shape[axis] for axis in BATCH if axis in mesh.shape)
    alone = jax.process_count() == 1
    # How many of the shards lie here: the rows of one process fill those, whatever the axes within.
    local = shards if alone else len({index[0].start for index in _local_indices(sharding, shards)})

    def place(array: Any) -> jax.Array:
        array = array if isinstance(array, jax.Array) and alone else np.asarray(array)
        if not array.ndim or array.shape[0] % local:
            rows = array.shape[0] if array.ndim else "no"
            raise JpeftError(
                f"shard_batch: {rows} rows cannot be dealt out to {local} shards (the mesh has "
                f"{dict(mesh.shape)}); make the batch a multiple of {local} rows"
            )
        return jax.device_put(array, sharding) if alone else jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(place, batch)


def _local_indices(sharding: NamedSharding, shards: int) -> list[tuple[slice, ...]]:
    return list(sharding.addressable_devices_indices_map((shards,)).values())  # type: ignore[arg-type]
