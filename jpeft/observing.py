"""`observe`: what wrappers show of themselves while a model computes, such as gates and attention over adapters."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from jpeft import paths
from jpeft.errors import JpeftError
from jpeft.partition import GraphDef, combine, partition
from jpeft.wrapper import Wrapper, observing


def observe(model: nnx.Module, *args: Any, adapter_ids: jax.Array | None = None, **kwargs: Any) -> dict[str, jax.Array]:
    """Calls `model` and returns what its wrappers show, `{"layers/0/self_attn/unipelt/gate": array, ...}` by layer.

    args, kwargs: of the model, arrays. adapter_ids: as in `jpeft.combine`. Layers run one by one, not as a scan,
    compiled once per structure. Raises JpeftError if the model shows nothing: UniPELT and AdapterFusion do.
    """
    graphdef, *arrays = partition(model)
    seen = _observed(graphdef, arrays, adapter_ids, args, kwargs)
    if not seen:
        raise JpeftError("observe: no wrapper of the model has anything to show; gates and fusion attention do")
    return seen


@functools.partial(jax.jit, static_argnums=0)
def _observed(graphdef: GraphDef, arrays: Any, ids: Any, args: Any, kwargs: Any) -> dict[str, jax.Array]:
    model = combine(graphdef, *arrays, adapter_ids=ids)
    for node in paths.nodes(model):
        module = node.module
        while isinstance(module, Wrapper):
            at = len(node.parts) if node.stack is None else node.stack[0]
            module.place = ("/".join(node.parts[:at]), "/".join((*node.parts[at:], module.name)))
            module = module.base
    with observing() as seen:
        model(*args, **kwargs)
    return dict(seen)
