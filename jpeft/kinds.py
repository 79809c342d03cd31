"""The kinds of layer that hold a weight, and the one fact about each that stacking needs: its own number of axes.

`kernel.shape[:-2]` is the layer axis of `nnx.Linear` alone; a `LinearGeneral` kernel may have any number of axes, so
each kind says how many are its own and the rest are leading (layer) axes.

A layer whose weight is stored in another form than one array derives from `Packed` and says which kind it stands for.
`dense_weight(module)` is the one way to the values of a weight, in float32, whatever form it is stored in: methods that
need them (for norms, or to start from a decomposition) ask it and so work on quantised layers as on plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jpeft.errors import JpeftError
from jpeft.wrapper import innermost


class Packed(nnx.Module):
    """A layer in the place of one of the kinds below, whose weight is stored in another form (`jpeft.quant`).

    Methods that leave the weight alone need not know; those that ask for its values call `dense_weight`. `jpeft.merge`
    replaces it by `plain()`.
    """

    stands_for: ClassVar[type[nnx.Module]]

    def weight_shape(self) -> tuple[int, ...]:
        """Lead + own shape of the weight it stands for."""
        raise NotImplementedError(f"{type(self).__name__} defines no weight_shape")

    def dense_weight(self, layers: tuple[int, ...] | None = None) -> Float[Array, "..."]:
        """See the function of this name."""
        raise NotImplementedError(f"{type(self).__name__} defines no dense_weight")

    def plain(self) -> nnx.Module:
        """The layer of the kind it stands for, with a weight in full precision."""
        raise NotImplementedError(f"{type(self).__name__} defines no plain")

    def storage(self) -> dict[str, Any]:
        """How the weight is stored, as JSON-ready data: an adapter trained on one form is not loaded onto another."""
        raise NotImplementedError(f"{type(self).__name__} defines no storage")

    def packed_again(self, plain: Any) -> Packed:
        """A layer stored as this one is, with the weight of `plain`, a layer of the kind this one stands for."""
        raise NotImplementedError(f"{type(self).__name__} defines no packed_again")


# kind -> (name of its weight, how many trailing axes of it are the layer's own)
KINDS: dict[type[nnx.Module], tuple[str, Callable[[Any], int]]] = {
    nnx.Linear: ("kernel", lambda m: 2),
    nnx.LinearGeneral: ("kernel", lambda m: len(m.batch_axis) + len(m.in_features) + len(m.out_features)),
    nnx.Einsum: ("kernel", lambda m: len(m.kernel_shape)),
    nnx.Conv: ("kernel", lambda m: len(m.kernel_size) + 2),
    nnx.Embed: ("embedding", lambda m: 2),
}


def kind_of(module: Any) -> type[nnx.Module] | None:
    """The entry of `KINDS` that `module` (under its wrappers) is or stands for, or None."""
    inner = innermost(module)
    if isinstance(inner, Packed):
        return inner.stands_for
    return next((kind for kind in KINDS if isinstance(inner, kind)), None)


def weight(module: Any) -> nnx.Variable:
    """The Variable of the wrapped layer's weight. Raises JpeftError if it is stored in packed form."""
    kind, inner = kind_of(module), innermost(module)
    assert kind is not None
    if isinstance(inner, Packed):
        raise JpeftError(
            f"{type(inner).__name__} has no weight that could be changed; dequantise the base first "
            "(jpeft.merge(model, dequantize=True) returns it in full precision)"
        )
    return getattr(inner, KINDS[kind][0])


def weight_shape(module: Any) -> tuple[int, ...]:
    """Lead + own shape of the wrapped layer's weight."""
    inner = innermost(module)
    return inner.weight_shape() if isinstance(inner, Packed) else tuple(weight(module).shape)


def own_shape(module: Any) -> tuple[int, ...]:
    """The shape of one layer's weight."""
    kind, shape = kind_of(module), weight_shape(module)
    assert kind is not None
    return shape[len(shape) - KINDS[kind][1](innermost(module)) :]


def lead(module: Any) -> tuple[int, ...]:
    """The leading (layer) axes of the weight: `()` for a layer that is not stacked."""
    shape = weight_shape(module)
    return shape[: len(shape) - len(own_shape(module))]


def dense_weight(module: Any, layers: tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The values of the wrapped layer's weight, lead + own shape, in float32; dequantised where it is quantised.

    layers: of a module in a `Stack`, those to return (they become the first axis), as a wrapper's `layers`. Works
    eagerly, under `jit` and inside a `Stack`, where the module is one layer.
    """
    inner = innermost(module)
    if isinstance(inner, Packed):
        return inner.dense_weight(layers)
    value = weight(module).get_value()
    return (value if layers is None else value[jnp.array(layers)]).astype(jnp.float32)
