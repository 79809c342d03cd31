"""Several tasks in one batch: each row uses its own adapter, over one base.

    served = jpeft.multi(model, [(adapter_a, buffers_a), (adapter_b, buffers_b)])
    graphdef, adapters, buffers, frozen = jpeft.partition(served)
    model = jpeft.combine(graphdef, adapters, buffers, frozen, adapter_ids=jnp.array([0, 1, -1, 0]))

Row i uses task adapter_ids[i]; -1 is the base alone. The tasks' arrays are stacked on an axis behind the layer axis and
gathered per layer, so a batch costs one pass through the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jpeft import paths, surgery
from jpeft.errors import JpeftError
from jpeft.partition import combine, partition
from jpeft.variables import AdapterBuffer, AdapterIds, Trainable, retype
from jpeft.wrapper import Wrapper

Task = tuple[Mapping[str, Any], Mapping[str, Any]]


def multi(model: nnx.Module, tasks: Sequence[Task]) -> Any:
    """`model` holding the adapters of all `tasks`, each an (adapter, buffers) pair of the keys and shapes of `model`'s.

    Raises JpeftError if a task does not fit, or if something trains outside a wrapper that can choose by row.
    """
    if not tasks:
        raise JpeftError("multi: no tasks; give (adapter, buffers) pairs as jpeft.partition returns them")
    graphdef, adapter, buffers, frozen = partition(model)
    for number, task in enumerate(tasks):
        if not (isinstance(task, tuple | list) and len(task) == 2 and all(isinstance(one, Mapping) for one in task)):
            raise JpeftError(f"multi: task {number} is no pair (adapter, buffers) as jpeft.partition returns them")
        _check(number, {**task[0], **task[1]}, {**adapter, **buffers})
    joined: dict[str, Any] = {}
    for key in (*adapter, *buffers):
        joined[key] = [task[0].get(key, task[1].get(key)) for task in tasks]

    served = combine(graphdef, adapter, buffers, frozen)
    unfit = []
    for path, variable in nnx.to_flat_state(nnx.state(served, (Trainable, AdapterBuffer))):
        key, owner = paths.key_of(served, path), surgery.get(served, path[:-1])
        if not (isinstance(owner, Wrapper) and owner.takes_many):
            unfit.append(key)
            continue
        stacked = retype(variable, type(variable))
        shared = variable.get_metadata().get("shared", False)
        stacked.set_value(jnp.stack(joined[key], axis=0 if shared else owner.leading))
        setattr(owner, str(path[-1]), stacked)
        owner.adapter_ids = AdapterIds(jnp.zeros((), jnp.int32), shared=True, tasks=len(tasks))
    if unfit:
        raise JpeftError(f"multi: {unfit} cannot differ from row to row; evaluate these tasks one by one")
    return served


def _check(number: int, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    said = [f"{key!r} is missing" for key in wanted if key not in given]
    said += [f"{key!r} is not in the model" for key in given if key not in wanted]
    said += [
        f"{key!r} has shape {tuple(given[key].shape)}, the model's has {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    if said:
        raise JpeftError(f"multi: task {number} does not fit the model: " + "; ".join(said))
