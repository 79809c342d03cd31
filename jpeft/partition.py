"""A model as plain JAX data: one static structure and three flat dicts of arrays keyed by canonical path.

    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    model = jpeft.combine(graphdef, adapter, buffers, frozen, dropout=key)

Differentiating with respect to `adapter` computes no gradient for the base. Code that keeps one tree uses
`trainable_mask` and `param_labels` with `optax.masked` and `optax.partition` instead.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft import paths, surgery
from jpeft.dropout import Dropout
from jpeft.errors import JpeftError, nearest
from jpeft.surgery import Path
from jpeft.variables import AdapterBuffer, AdapterIds, DropoutKey, Trainable
from jpeft.wrapper import Wrapper

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GraphDef:
    """The static part of a model: hashable, equal for models of equal structure; `combine` turns it back into one.

    slots: (canonical key, path in the NNX state) of every array. dropout: (path, shape) of every dropout key, ids: path
    of every `AdapterIds`; `combine` fills both.
    """

    nnx: nnx.GraphDef
    slots: tuple[tuple[str, Path], ...]
    dropout: tuple[tuple[Path, tuple[int, ...]], ...]
    ids: tuple[Path, ...]


class Partition(NamedTuple):
    """What `partition` returns."""

    graphdef: GraphDef
    adapter: Arrays
    buffers: Arrays
    frozen: Arrays


def variables(model: nnx.Module) -> Iterator[tuple[str, Path, Any]]:
    """(canonical key, path, Variable or raw array) of every leaf of the model's state, in the order of the keys."""
    flat = nnx.to_flat_state(nnx.state(model))
    found = [(paths.key_of(model, path), path, variable) for path, variable in flat]

    def order(entry: tuple[str, Path, Any]) -> list[tuple[bool, int, str]]:
        # Numbers by value: layers/2 before layers/10.
        return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in entry[0].split("/")]

    yield from sorted(found, key=order)


def partition(model: nnx.Module) -> Partition:
    """Splits a model into (graphdef, adapter, buffers, frozen).

    adapter: what trains. buffers: what belongs to the task but has no gradient. frozen: everything else. The arrays are
    the model's own: once a jitted step donates the adapter, use `combine` and no longer the model.
    """
    graphdef, _ = nnx.split(model)
    parts: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
    slots, dropout, ids = [], [], []
    for key, path, variable in variables(model):
        if isinstance(variable, DropoutKey):
            dropout.append((path, tuple(variable.shape)))
            continue
        if isinstance(variable, AdapterIds):
            ids.append(path)
            continue
        kind = 0 if isinstance(variable, Trainable) else 1 if isinstance(variable, AdapterBuffer) else 2
        if any(key in part for part in parts):
            raise JpeftError(f"two variables of the model have the canonical key {key!r}; rename one of the attributes")
        parts[kind][key] = value_of(variable)
        slots.append((key, path))
    return Partition(GraphDef(graphdef, tuple(slots), tuple(dropout), tuple(ids)), *parts)


def combine(
    graphdef: GraphDef,
    adapter: Mapping[str, Any],
    buffers: Mapping[str, Any],
    frozen: Mapping[str, Any],
    *,
    dropout: jax.Array | None = None,
    adapter_ids: jax.Array | None = None,
) -> Any:
    """The model again, from the parts of `partition` or others of the same keys; usable inside jit, grad and vmap.

    dropout: a PRNG key. Every dropout of the model (jpeft's and `nnx.Dropout`) is switched on and gets its own key from
    this one, its path and its layer, so a step is a pure function of its arguments; pass `fold_in(key, step)`. Without
    it the model is deterministic.

    adapter_ids: [B] whole numbers, for a model made by `jpeft.multi`: which task each row of the batch uses, -1 for the
    base alone.

    Raises JpeftError if keys are missing or unknown, if adapter_ids are missing or not asked for, or if one is no
    task's. Inside jit their values are not known: the adapter's part of such a row is then not a number.
    """
    given = {**frozen, **buffers, **adapter}
    known = dict(graphdef.slots)
    if given.keys() != known.keys() or len(given) != len(frozen) + len(buffers) + len(adapter):
        _refuse_keys(known, adapter, buffers, frozen)
    leaves: list[tuple[Path, Any]] = [(path, given[key]) for key, path in graphdef.slots]
    blank = jax.random.key(0)
    leaves += [(path, jnp.broadcast_to(blank, shape)) for path, shape in graphdef.dropout]
    if graphdef.ids and adapter_ids is None:
        raise JpeftError("combine: the model holds several adapters; pass adapter_ids=, one number per row")
    if adapter_ids is not None and not graphdef.ids:
        raise JpeftError("combine: adapter_ids are given, but the model holds one adapter; see jpeft.multi")
    leaves += [(path, jnp.asarray(adapter_ids)) for path in graphdef.ids]
    model = nnx.merge(graphdef.nnx, nnx.from_flat_state(leaves))
    if adapter_ids is not None:
        check_ids(adapter_ids, tasks_of(model))
    _set_dropout(model, dropout)
    return model


def check_ids(ids: Any, tasks: int) -> None:
    """Raises JpeftError if `ids` are not the numbers of tasks, one per row. Of traced ones the values are not known."""
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise JpeftError(f"adapter_ids must be whole numbers [batch], found {ids.dtype}{list(ids.shape)}")
    if isinstance(ids, np.ndarray) or (not isinstance(ids, jax.core.Tracer) and ids.is_fully_addressable):
        strange = sorted({int(task) for task in np.asarray(ids) if not -1 <= task < tasks})
        if strange:
            raise JpeftError(
                f"adapter_ids: there is no task {strange[0]}; they are 0 to {tasks - 1}, and -1 is the base alone"
            )


def tasks_of(model: nnx.Module) -> int:
    """How many tasks a model of `jpeft.multi` holds; 0 for any other model."""
    found = (module.adapter_ids for _, module in surgery.modules(model) if isinstance(module, Wrapper))
    return next((int(ids.get_metadata("tasks")) for ids in found if ids is not None), 0)


def _refuse_keys(known: Mapping[str, Path], *parts: Mapping[str, Any]) -> None:
    given = [key for part in parts for key in part]
    said = [f"missing {key!r}" for key in known if key not in given]
    said += [f"unknown {key!r} (nearest: {nearest(key, known, 1)})" for key in given if key not in known]
    said += [f"{key!r} given twice" for key in sorted({key for key in given if given.count(key) > 1})]
    more = f" and {len(said) - 8} more" if len(said) > 8 else ""
    raise JpeftError("combine: the arrays do not fit the graphdef: " + "; ".join(said[:8]) + more)


def _set_dropout(model: nnx.Module, key: jax.Array | None) -> None:
    for node in paths.nodes(model):
        module = node.module
        if not _has_dropout(module):
            continue
        setattr(
            module, *(("active", key is not None) if isinstance(module, Dropout) else ("deterministic", key is None))
        )
        if key is None:
            continue
        if isinstance(module, Dropout):
            if module.common:
                own = jnp.broadcast_to(jax.random.fold_in(key, zlib.crc32(b"common")), module.key.shape)
            else:
                own = node.keys(key, "dropout", module.key.shape, _covered(model, node.path))
            module.key.set_value(own)
        elif isinstance(module.rngs, nnx.RngStream):
            stream = module.rngs
            stream.key.set_value(node.keys(key, "dropout", stream.key.shape))
            stream.count.set_value(jnp.zeros(stream.count.shape, stream.count.dtype))


def _has_dropout(module: Any) -> bool:
    if isinstance(module, nnx.MultiHeadAttention):
        return module.dropout_rate > 0
    return isinstance(module, Dropout | nnx.Dropout)


def _covered(model: nnx.Module, path: Path) -> tuple[int, ...] | None:
    """The layers that the wrapper around `path` covers."""
    node: Any = model
    layers = None
    for name in path:
        layers = node.layers if isinstance(node, Wrapper) else layers
        node = surgery.child(node, name)
    return layers


def value_of(variable: Any) -> Any:
    """The array (or abstract array) of a Variable or raw leaf."""
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def trainable_mask(model: nnx.Module) -> dict[str, bool]:
    """{canonical key: whether it trains} for every array of the model.

    The tree it belongs to is `{**adapter, **buffers, **frozen}` of `partition(model)`; given back through
    `combine(graphdef, tree, {}, {})`. `optax.masked(optimizer, mask)` passes the gradients of masked-out arrays on as
    updates, so chain it with `optax.masked(optax.set_to_zero(), {k: not v for k, v in mask.items()})`, or use
    `optax.partition` with `param_labels`. Differentiate floating-point arrays only: keys and counters stay outside.
    """
    return {
        key: isinstance(v, Trainable) for key, _, v in variables(model) if not isinstance(v, DropoutKey | AdapterIds)
    }


def param_labels(model: nnx.Module) -> dict[str, str]:
    """{canonical key: label} for every array of the model, as `optax.partition` takes it.

    What trains is labelled with its `group` (`"lora_a"`, `"lora_b"`, `"head"`, ...; `"adapter"` without one), all else
    `"frozen"`: give that label `optax.set_to_zero()`.
    """
    labels = {}
    for key, _, variable in variables(model):
        if isinstance(variable, Trainable):
            labels[key] = str(variable.get_metadata().get("group", "adapter"))
        elif not isinstance(variable, DropoutKey | AdapterIds):
            labels[key] = "frozen"
    return labels
