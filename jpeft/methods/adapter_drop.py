"""AdapterDrop: adapters of some layers taken away for inference. Rücklé et al. 2021, arXiv:2010.11918.

Lower layers matter least, most of all after training with `drop=`, which leaves them out at random. A `Stack` then runs
the layers without adapters as the base runs them, so what is taken away costs nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import paths, surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.method import Method
from jpeft.paths import Node
from jpeft.wrapper import Wrapper


@dataclasses.dataclass(frozen=True)
class DropAdapters(Method):
    """Takes the adapters of `layers` away; see `drop_adapters`.

    layers: numbers of layers, in encoder-decoders those of the encoder and of the decoder.
    """

    kind: ClassVar[str] = "drop_adapters"

    layers: Any

    def __post_init__(self) -> None:
        fields.settle(self, layers=fields.layer_numbers(self.layers))
        if self.layers is None:
            raise JpeftError("DropAdapters: layers=None; give the numbers of the layers, such as range(5)")

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
        dropped = set(self.layers)

        def without(module: Any) -> Any:
            node = places.get(id(module))
            if node is None:
                return module
            covered = _covered(module, node)
            kept = [row for row, member in enumerate(covered) if node.layer(member) not in dropped]
            if not kept:
                return module.base
            if len(kept) < len(covered):
                _keep_rows(module, jnp.array(kept), outermost=True)
                module.layers = tuple(covered[row] for row in kept)
            return module

        return surgery.rewrite(copy, without, copy=False)


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


def drop_adapters(model: nnx.Module, layers: Any) -> Any:
    """A copy of `model` without the bottleneck adapters of `layers` (numbers, such as `range(5)`), which is faster.

    Norms that were trained stay, and so does everything that is no adapter. The copy can be trained, saved and loaded.
    Raises JpeftError if one of the layers has no adapter.
    """
    return DropAdapters(layers=layers)(model, rngs=0)
