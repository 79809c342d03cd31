"""Where the arrays of a run lie: on one device, or over a mesh as the configuration's `mesh:` says."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jpeft
from jpeft.errors import JpeftError
from jpeft.sharding import AXES, BATCH, Rules, batch_sharding
from train.schema import Config, TrainingConfig

HOST = "pinned_host"


def mesh_of(config: Config) -> Mesh | None:
    """The mesh of a run; None for one device.

    Raises JpeftError for sizes that the devices here do not make up, and for batches that cannot be dealt out evenly.
    """
    sizes = config.mesh.model_dump(include=set(AXES))
    several = jax.process_count() > 1
    if several and not jax.distributed.is_initialized():
        raise JpeftError(
            f"mesh: the devices here are those of {jax.process_count()} processes, which this one has not joined; give "
            "--processes auto to jpeft train, on every host"
        )
    if all(size == 1 for size in sizes.values()) and not several:
        return None
    if several and -1 not in sizes.values() and np.prod(list(sizes.values())) == 1:
        raise JpeftError(
            f"mesh: {jax.process_count()} processes need a mesh; mesh.data=-1 deals batches out to all their devices"
        )
    mesh = jpeft.make_mesh(**sizes)
    if mesh.size == 1:
        return None
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    batches = {
        "training.batch_size": config.training.batch_size,
        "evaluation.batch_size": config.evaluation.batch_size or 4 * config.training.batch_size,
    }
    for key, rows in batches.items():
        if rows % shards:
            raise JpeftError(
                f"{key}: {rows} rows cannot be dealt out to {shards} shards (mesh: data {mesh.shape['data']}, fsdp "
                f"{mesh.shape['fsdp']}); make it a multiple of {shards}"
            )
    return mesh


def rules_of(config: Config) -> Rules:
    """The rules of the configuration, before the model's own. Raises JpeftError for an axis that there is none of."""
    made = {}
    for target, axes in (config.mesh.rules or {}).items():
        for axis in axes:
            if axis is not None and axis not in AXES:
                raise JpeftError(f"mesh.rules.{target}: no axis {axis!r}; there are {', '.join(AXES)}, and null")
        made[target] = PartitionSpec(*axes)
    return made


def own_rows(mesh: Mesh | None, rows: int) -> np.ndarray | None:
    """Which of `rows` rows of a batch lie on devices of this process, in order; None: all, for there is no other."""
    if mesh is None or jax.process_count() == 1:
        return None
    found = rows_along(mesh, 0).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in found.values() if index is not None]))


def put(batch: dict[str, Any], mesh: Mesh | None, axis: int = 0, rows: int | None = None) -> dict[str, Any]:
    """A batch on its device or devices; axis: of the rows.

    rows: of the whole batch, where `batch` has only the rows of this process (`own_rows`).
    """
    if mesh is None:
        return jax.device_put(batch)
    sharding = rows_along(mesh, axis)
    own = None if rows is None else own_rows(mesh, rows)
    if own is None:
        return {name: jax.device_put(array, sharding) for name, array in batch.items()}

    def place(array: Any) -> jax.Array:
        shape = (*array.shape[:axis], rows, *array.shape[axis + 1 :])

        def part(index: Any) -> np.ndarray:
            return np.take(array, np.searchsorted(own, np.arange(rows or 0)[index[axis]]), axis)

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(array) for name, array in batch.items()}


def rows_along(mesh: Mesh, axis: int) -> NamedSharding:
    """Rows, which are axis number `axis` of an array, along the data axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, *batch_sharding(mesh).spec))


def layouts(
    transform: Any, adapter: dict[str, Any], mesh: Mesh | None, *, on_host: bool = False
) -> tuple[Any, Any] | None:
    """Where a step leaves the adapter and the optimizer's state: as the adapter lies; None for one device.

    on_host: the arrays of the state in the memory of the devices' hosts.
    """
    where: dict[str, Any]
    if mesh is not None:
        where = {key: value.sharding for key, value in adapter.items()}
        lies = jpeft.optimizer_shardings(transform, adapter, where)
    elif on_host:
        one = SingleDeviceSharding(jax.local_devices()[0])
        where = dict.fromkeys(adapter, one)
        lies = jax.tree.map(lambda _: one, jax.eval_shape(transform.init, adapter))
    else:
        return None
    if on_host:
        state = jax.eval_shape(transform.init, adapter)
        lies = jax.tree.map(lambda like, at: at.with_memory_kind(HOST) if like.ndim else at, state, lies)
    return where, lies


def missing_host_memory() -> str | None:
    """Why arrays cannot be kept in the memory of the host, if they cannot."""
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    return None if HOST in kinds else f"{device.device_kind} offers no memory of kind {HOST}, only {', '.join(kinds)}"


def offloads(training: TrainingConfig, what: str) -> bool:
    """Whether a run keeps `what` in the memory of the host: it was asked to, and there is such memory."""
    return what in training.offload and missing_host_memory() is None
