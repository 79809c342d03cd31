"""The kinds of layer that hold a weight, and the one fact about each that stacking needs: its own number of axes.

`kernel.shape[:-2]` is the layer axis of `nnx.Linear` alone; a `LinearGeneral` kernel may have any number of axes, so
each kind says how many are its own and the rest are leading (layer) axes.

`dense_weight(module)` is the one way to the values of a weight, in float32, whatever form it is stored in: methods that
need them (for norms, or to start from a decomposition) ask it and so work on quantised layers as on plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jpeft.wrapper import innermost

# kind -> (name of its weight, how many trailing axes of it are the layer's own)
KINDS: dict[type[nnx.Module], tuple[str, Callable[[Any], int]]] = {
    nnx.Linear: ("kernel", lambda m: 2),
    nnx.LinearGeneral: ("kernel", lambda m: len(m.batch_axis) + len(m.in_features) + len(m.out_features)),
    nnx.Einsum: ("kernel", lambda m: len(m.kernel_shape)),
    nnx.Conv: ("kernel", lambda m: len(m.kernel_size) + 2),
    nnx.Embed: ("embedding", lambda m: 2),
}


def kind_of(module: Any) -> type[nnx.Module] | None:
    """The entry of `KINDS` that `module` (under its wrappers) is, or None."""
    inner = innermost(module)
    return next((kind for kind in KINDS if isinstance(inner, kind)), None)


def weight(module: Any) -> nnx.Variable:
    """The Variable of the wrapped layer's weight."""
    kind = kind_of(module)
    assert kind is not None
    return getattr(innermost(module), KINDS[kind][0])


def own_shape(module: Any) -> tuple[int, ...]:
    """The shape of one layer's weight."""
    kind = kind_of(module)
    assert kind is not None
    shape = weight(module).shape
    return shape[len(shape) - KINDS[kind][1](innermost(module)) :]


def lead(module: Any) -> tuple[int, ...]:
    """The leading (layer) axes of the weight: `()` for a layer that is not stacked."""
    shape = weight(module).shape
    return shape[: len(shape) - len(own_shape(module))]


def dense_weight(module: Any, layers: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The values of the wrapped layer's weight, lead + own shape, in float32.

    layers: of a module in a `Stack`, those to return (they become the first axis), as a wrapper's `layers`. Works
    eagerly, under `jit` and inside a `Stack`, where the module is one layer.
    """
    value = weight(module).get_value()
    return (value if layers is None else value[jnp.array(layers)]).astype(jnp.float32)
