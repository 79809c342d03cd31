"""`fuse`: adapters of several tasks, from memory, in one model with attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jpeft.errors import JpeftError
from jpeft.merge import strip
from jpeft.methods import AdapterFusion, applied
from jpeft.methods.fusion import one_of, stacked
from jpeft.multi import Task
from jpeft.partition import combine, partition


def fuse(model: nnx.Module, tasks: Sequence[Task], *, rngs: nnx.Rngs | jax.Array | int, **settings: Any) -> Any:
    """The base of `model` with the adapters of all `tasks`, frozen, and attention over them to train.

    model: one that `Pfeiffer` adapted, or `Houlsby` without trained norms; its head, if it trains, is the new task's.
    tasks: (adapter, buffers) pairs of `jpeft.partition`, as in `jpeft.multi`. settings: of `AdapterFusion`.

    Raises JpeftError if a task does not fit.
    """
    if not tasks:
        raise JpeftError("fuse: no tasks; give (adapter, buffers) pairs as jpeft.partition returns them")
    method = one_of(applied(model), "the model")
    fused = AdapterFusion(adapter=method, tasks=len(tasks), **settings)(strip(model), rngs=rngs)
    parts = partition(fused)
    arrays = [{**adapter, **buffers} for adapter, buffers in tasks]
    buffers = dict(parts.buffers)
    ending = settings.get("name", AdapterFusion.name)
    for key in parts.buffers:
        place, owner, name = key.rsplit("/", 2) if key.count("/") > 1 else ("", *key.split("/"))
        if owner == ending:
            buffers[key] = stacked(arrays, "/".join(part for part in (place, method.name, name) if part), name)
    return combine(parts.graphdef, parts.adapter, buffers, parts.frozen)
