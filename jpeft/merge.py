"""Back to a plain model: `strip` takes the wrappers off, `merge` folds them into the weights.

Both return a copy; the adapted model and its base arrays stay as they are, so unmerging is keeping them, bit for bit.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import kinds, paths, surgery
from jpeft.errors import JpeftError
from jpeft.methods.method import METHODS_ATTRIBUTE
from jpeft.variables import Frozen, Trainable, retype, unfreeze
from jpeft.wrapper import NotMergeable, Wrapper, chain

_Packed: TypeAlias = tuple[str, kinds.Packed | None, Any]  # where, what it was, what was made of it


def strip(model: nnx.Module) -> Any:
    """The base: `model` without any wrapper, with its parameters' own Variable types and the same arrays."""
    _check_module(model, "strip")
    bare = surgery.rewrite(model, lambda module: module.base if isinstance(module, Wrapper) else module)
    return _plain(surgery.map_variables(bare, unfreeze))


def merge(model: nnx.Module, *, dequantize: bool = False, requantize: bool = False) -> Any:
    """A plain model whose weights contain the adapters; it computes the same as `model` without dropout.

    Arithmetic is in float32 and cast to the weight's dtype last. A quantised weight cannot hold an adapter exactly.
    dequantize: all quantised layers become plain ones in full precision. requantize: merged weights are quantised again
    in the format they had, the others stay as they are; a warning tells the error that this makes.

    Raises JpeftError, naming every module, if a wrapper is no function of the weight it wraps, if it wraps a quantised
    layer and neither is chosen, or if a merged weight is not finite; `model` is unchanged either way.
    """
    if dequantize and requantize:
        raise JpeftError("merge: choose dequantize=True or requantize=True, not both")
    _check_module(model, "merge")
    copy = nnx.clone(model)
    places = {id(wrapper): node.name for node in paths.nodes(copy) for wrapper in chain(node.module)}
    problems: list[str] = []
    checks: list[tuple[str, jax.Array]] = []
    quantized: dict[int, _Packed] = {}  # by identity of what was made of it, kept beside it

    def fold(module: Any) -> Any:
        if not isinstance(module, Wrapper):
            return module
        where = f"{places.get(id(module), '?')} ({module.name})"
        base: Any = module.base
        packed = quantized.pop(id(base), ("", None, None))[1]
        if isinstance(base, kinds.Packed):
            if not (dequantize or requantize):
                problems.append(
                    f"{where}: its base is quantised and cannot hold the adapter exactly; pass dequantize=True for a "
                    "model in full precision, or requantize=True to quantise again, which makes an error"
                )
                return base
            base, packed = base.plain(), base
        try:
            folded = module.fold(base)
        except NotMergeable as reason:
            problems.append(f"{where}: {reason}")
            return base
        if packed is not None:
            quantized[id(folded)] = (places.get(id(module), "?"), packed, folded)
        for name, variable in surgery.children(folded):
            if isinstance(variable, nnx.Param | Frozen) and jnp.issubdtype(variable.dtype, jnp.floating):
                checks.append((f"{where}, {name}", jnp.all(jnp.isfinite(variable.get_value()))))
        return folded

    made = surgery.rewrite(copy, fold, copy=False)
    problems += [
        f"{where}: the merged weight is not finite (an overflow of its dtype, or NaN in the adapter or base)"
        for where, finite in checks
        if not isinstance(finite, jax.core.Tracer) and not bool(finite)
    ]
    if problems:
        raise JpeftError("merge: " + "; ".join(problems))
    if dequantize:
        made = surgery.rewrite(made, lambda m: m.plain() if isinstance(m, kinds.Packed) else m, copy=False)
    if requantize:
        made = _requantized(made, quantized)

    def settled(variable: nnx.Variable) -> nnx.Variable:
        return retype(variable, nnx.Param) if isinstance(variable, Trainable) else unfreeze(variable)

    return _plain(surgery.map_variables(made, settled))


def _requantized(model: Any, quantized: dict[int, _Packed]) -> Any:
    """`model` with the merged layers packed as they were; warns of the error that this makes."""
    errors: list[tuple[float, str]] = []

    def again(module: Any) -> Any:
        if id(module) not in quantized:
            return module
        where, packed, _ = quantized[id(module)]
        assert packed is not None
        made = packed.packed_again(module)
        wanted, got = kinds.dense_weight(module), kinds.dense_weight(made)
        if not isinstance(wanted, jax.core.Tracer):
            error = float(jnp.linalg.norm(got - wanted) / jnp.maximum(jnp.linalg.norm(wanted), 1e-30))
            errors.append((error, where))
        return made

    made = surgery.rewrite(model, again, copy=False)
    if errors:
        worst = ", ".join(f"{error:.2%} at {where}" for error, where in sorted(errors, reverse=True)[:3])
        warnings.warn(
            f"merge: quantising {len(errors)} merged weights again changed them, in relative Frobenius norm, by "
            f"{sum(error for error, _ in errors) / len(errors):.2%} on average and at most by {worst}",
            stacklevel=3,
        )
    return made


def _check_module(model: Any, caller: str) -> None:
    if not isinstance(model, nnx.Module):
        raise JpeftError(f"{caller}: expected an nnx.Module, found a {type(model).__name__}")


def _plain(model: Any) -> Any:
    if METHODS_ATTRIBUTE in vars(model):
        delattr(model, METHODS_ATTRIBUTE)
    return model
