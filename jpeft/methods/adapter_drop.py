"""AdapterDrop: adapters of some layers taken away for inference. Rücklé et al. 2021, arXiv:2010.11918.

Lower layers matter least, most of all after training with `drop=`, which leaves them out at random. A `Stack` then runs
the layers without adapters as the base runs them, so what is taken away costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sized
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import paths, surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.fusion_wrappers import FusedAdapters, count_of
from jpeft.methods.method import Method
from jpeft.paths import Node
from jpeft.wrapper import Wrapper


@dataclasses.dataclass(frozen=True)
class DropAdapters(Method):
    """Takes the adapters of `layers` away; see `drop_adapters`.

    layers: numbers of layers, in encoder-decoders those of the encoder and of the decoder.
    fused: numbers of adapters that `AdapterFusion` attends to, taken away in all layers.
    """

    kind: ClassVar[str] = "drop_adapters"

    layers: Any = ()
    fused: Any = ()

    def __post_init__(self) -> None:
        for name in ("layers", "fused"):
            given = getattr(self, name)
            none = given is None or (isinstance(given, Sized) and len(given) == 0)
            fields.settle(self, **{name: () if none else fields.layer_numbers(given, name)})
        if not (self.layers or self.fused):
            raise JpeftError("DropAdapters: nothing to drop; give the numbers of layers, such as range(5), or fused=")

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        copy = nnx.clone(model)
        places: dict[int, Node] = {}
        present: set[int | None] = set()
        for node in paths.nodes(copy):
            module = node.module
            while isinstance(module, Wrapper):
                if module.droppable:
                    places[id(module)] = node
                    present |= {node.layer(member) for member in _covered(module, node)}
                module = module.base
        numbers = sorted(number for number in present if number is not None)
        if missing := [layer for layer in self.layers if layer not in numbers]:
            has = f"has them in layers {numbers}" if numbers else "has none in any layer"
            raise JpeftError(f"drop_adapters: layers={missing} have no adapter to drop; the model {has}")
        self._check_fused(copy)
        dropped = set(self.layers)

        def without(module: Any) -> Any:
            node = places.get(id(module))
            if node is None:
                return module
            covered = _covered(module, node)
            kept = [row for row, member in enumerate(covered) if node.layer(member) not in dropped]
            if not kept:
                return module.base
            if self.fused and isinstance(module, FusedAdapters):
                module.keep(jnp.array([n for n in range(count_of(module)) if n not in self.fused]))
            if len(kept) < len(covered):
                _keep_rows(module, jnp.array(kept), outermost=True)
                module.layers = tuple(covered[row] for row in kept)
            return module

        return surgery.rewrite(copy, without, copy=False)

    def _check_fused(self, model: nnx.Module) -> None:
        counts = [count_of(module) for _, module in surgery.modules(model) if isinstance(module, FusedAdapters)]
        if self.fused and (not counts or self.fused[-1] >= min(counts) or len(self.fused) >= min(counts)):
            has = f"has {min(counts)}, of which one must stay" if counts else "has none"
            raise JpeftError(f"drop_adapters: fused={list(self.fused)}, but the model {has}")


def _covered(module: Wrapper, node: Node) -> tuple[Any, ...]:
    """The members of the stack (or None, without one) whose rows a wrapper holds."""
    return node.members if module.layers is None else module.layers


def _keep_rows(module: Any, rows: jax.Array, *, outermost: bool = False) -> None:
    """Keeps these rows of the layer axis of all variables of a wrapper."""
    for name, value in list(surgery.children(module)):
        if outermost and name == "base":
            continue
        if isinstance(value, nnx.Variable):
            if not value.get_metadata().get("shared", False):
                value.set_value(value.get_value()[rows])
        elif isinstance(value, nnx.Module):
            _keep_rows(value, rows)


def drop_adapters(model: nnx.Module, layers: Any = (), *, fused: Any = ()) -> Any:
    """A copy of `model` without the bottleneck adapters of `layers` (numbers, such as `range(5)`), which is faster.

    fused: numbers of adapters that `AdapterFusion` no longer attends to, in any layer.

    Norms that were trained stay, and so does everything that is no adapter. The copy can be trained, saved and loaded.
    Raises JpeftError if one of the layers has no adapter, or the fusion none of these numbers.
    """
    return DropAdapters(layers=layers, fused=fused)(model, rngs=0)
