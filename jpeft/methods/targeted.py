"""What methods share that wrap the modules their `targets` name: finding them, their layers, what a file records."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
from flax import nnx

from jpeft import kinds, surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.method import Method, refuse_second
from jpeft.paths import Node
from jpeft.stack import runs
from jpeft.targets import Entry, Layers, entries, lasting, resolve, role
from jpeft.wrapper import Wrapper

# More scans than this cost more compile time than the layers in between are worth; then the hull is adapted and the
# layers in its holes get an update of zero.
_MOST_RUNS = 4


class Targeted(Method):
    """A method with the fields `targets`, `exclude`, `layers` and `name`, which subclasses declare with their defaults.

    Subclasses set `wraps` (or define `accepts`), call `self.settle_targets()` in `__post_init__`, and define either
    `wrapper` (one node at a time; then `apply` is here) or `apply`.

    role: which of the model's declared roles, or which several, the targets are when `targets` is None.
    """

    wraps: ClassVar[tuple[type[nnx.Module], ...]] = ()
    role: ClassVar[str | tuple[str, ...] | None] = None

    targets: Any
    exclude: Any
    layers: Any
    name: str

    def settle_targets(self) -> None:
        """Puts the four fields into their one form. Raises JpeftError for what cannot be."""
        try:
            targets = None if self.targets is None and self.role else entries(self.targets)
            exclude = entries(self.exclude)
        except JpeftError as error:
            raise JpeftError(f"{type(self).__name__}: {error}") from None
        fields.settle(self, targets=targets, exclude=exclude, layers=fields.layer_numbers(self.layers))
        fields.check_name(self)

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        replacements: dict[surgery.Path, Callable[[Any], Any]] = {}
        for node, layers in self.resolve(model):
            refuse_second(node.module, self.name, node.name)
            replacements[node.path] = self._placed(node, layers, key)
        return surgery.replace(model, replacements)

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> Wrapper:
        """The wrapper around `base`, a module of the copy, which stands at `node`.

        layers: those that the wrapper's variables cover, None for all. key: the method's; see `node.keys`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither apply nor wrapper")

    def recorded(self, model: nnx.Module) -> tuple[Method, ...]:
        if all(lasting(entry) for entry in (*(self.targets or ()), *self.exclude)):
            return (self,)
        return (replaced(self, targets=exact_names(self.resolve(model)), exclude=(), layers=None),)

    def resolve(self, model: nnx.Module) -> list[tuple[Node, Layers]]:
        """The nodes to wrap, each with the layers that are meant (None: all of them, or there are none)."""
        named = type(self).__name__
        targets = self._by_role(model) if self.targets is None else self.targets
        return resolve(
            model,
            targets=targets,
            exclude=self.exclude,
            layers=self.layers,
            kinds=self.wraps,
            method=named,
            accepts=self.accepts(),
        )

    def _by_role(self, model: nnx.Module) -> tuple[Entry, ...]:
        wanted = (self.role,) if isinstance(self.role, str) else self.role or ()
        return tuple(entry for one in wanted for entry in role(model, one, type(self).__name__))

    def accepts(self) -> Callable[[Any], bool] | None:
        """For a method that can wrap other modules than the kinds of `wraps`: whether it can wrap a module."""
        return None

    def _placed(self, node: Node, layers: Layers, key: jax.Array, *more: Any) -> Callable[[Any], Any]:
        def wrap(base: Any) -> Any:
            try:
                return self.wrapper(base, node, layers, key, *more)
            except JpeftError as error:
                raise JpeftError(f"{error} ({node.name or 'the model itself'!r})") from None

        return wrap


def targets_or_none(given: Any) -> tuple[Entry, ...] | None:
    """Targets of a part of a method in their one form; None, for what the model declares, stays None."""
    return None if given is None else entries(given)


def replaced(method: Any, **changes: Any) -> Any:
    """`method` with other values of some fields."""
    return dataclasses.replace(method, **changes)


def exact_names(found: Iterable[tuple[Node, Layers]]) -> tuple[str, ...]:
    """Targets that select these nodes and layers, and nothing else."""
    names = [node.expanded(member) for node, layers in found for member in layers or (None,)]
    return tuple(f"^{re.escape(name)}$" for name in names)


def covered(node: Node, live: Iterable[int]) -> Layers:
    """The layers a wrapper's variables cover: None for all, the live ones, or their hull if those lie scattered."""
    live = sorted(live)
    if node.length is None or len(live) == node.length:
        return None
    if len(runs(node.length, [set(live)])) <= _MOST_RUNS:
        return tuple(live)
    hull = tuple(range(live[0], live[-1] + 1))
    return None if len(hull) == node.length else hull


def lead_of(node: Node, layers: Layers) -> tuple[int, ...]:
    """The leading axes of a wrapper's variables at a node, where they cover `layers`."""
    if kinds.kind_of(node.module) is None:
        lead: tuple[int, ...] = () if node.length is None else (node.length,)
    else:
        lead = kinds.lead(node.module)
    return lead if layers is None else (len(layers), *lead[1:])
