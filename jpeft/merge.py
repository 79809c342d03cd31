"""Back to a plain model: `strip` takes the wrappers off, `merge` folds them into the weights.

Both return a copy; the adapted model and its base arrays stay as they are, so unmerging is keeping them, bit for bit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import kinds, paths, surgery
from jpeft.errors import JpeftError
from jpeft.methods.method import METHODS_ATTRIBUTE
from jpeft.variables import Trainable, retype, unfreeze
from jpeft.wrapper import NotMergeable, Wrapper


def strip(model: nnx.Module) -> Any:
    """The base: `model` without any wrapper, with its parameters' own Variable types and the same arrays."""
    bare = surgery.rewrite(model, lambda module: module.base if isinstance(module, Wrapper) else module)
    return _plain(surgery.map_variables(bare, unfreeze))


def merge(model: nnx.Module) -> Any:
    """A plain model whose weights contain the adapters; it computes the same as `model` without dropout.

    Arithmetic is in float32 and cast to the weight's dtype last. Raises JpeftError, naming every module, if a wrapper
    is no function of the weight it wraps or a merged weight is not finite; `model` is unchanged either way.
    """
    copy = nnx.clone(model)
    places = {id(wrapper): node.name for node in paths.nodes(copy) for wrapper in _chain(node.module)}
    problems: list[str] = []
    checks: list[tuple[str, jax.Array]] = []

    def fold(module: Any) -> Any:
        if not isinstance(module, Wrapper):
            return module
        where = f"{places.get(id(module), '?')} ({module.name})"
        try:
            folded = module.fold(module.base)
        except NotMergeable as reason:
            problems.append(f"{where}: {reason}")
            return module.base
        if kinds.kind_of(folded) is not None:
            checks.append((where, jnp.all(jnp.isfinite(kinds.weight(folded).get_value()))))
        return folded

    made = surgery.rewrite(copy, fold, copy=False)
    problems += [
        f"{where}: the merged weight is not finite (an overflow of its dtype, or NaN in the adapter or base)"
        for where, finite in checks
        if not isinstance(finite, jax.core.Tracer) and not bool(finite)
    ]
    if problems:
        raise JpeftError("merge: " + "; ".join(problems))

    def settled(variable: nnx.Variable) -> nnx.Variable:
        return retype(variable, nnx.Param) if isinstance(variable, Trainable) else unfreeze(variable)

    return _plain(surgery.map_variables(made, settled))


def _chain(module: Any) -> list[Wrapper]:
    found = []
    while isinstance(module, Wrapper):
        found.append(module)
        module = module.base
    return found


def _plain(model: Any) -> Any:
    if METHODS_ATTRIBUTE in vars(model):
        delattr(model, METHODS_ATTRIBUTE)
    return model
