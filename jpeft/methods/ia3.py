"""(IA)3: learned vectors that rescale activations. Liu et al. 2022, arXiv:2205.05638.

    y = base(x) * l    after keys and values,    y = base(x * l)    before the last layer of the feed-forward

Every l starts as one. Both are functions of the weight, so they merge: its columns (and the bias) or its
rows are scaled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jpeft import kinds, surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.method import Method, refuse_second
from jpeft.methods.targeted import Targeted, exact_names, lead_of, replaced
from jpeft.paths import Node
from jpeft.targets import Layers, entries, lasting, role
from jpeft.variables import Trainable
from jpeft.wrapper import NotMergeable, Wrapper, innermost, of_tasks


class Rescaled(Wrapper):
    """A linear layer whose output, or input, is multiplied by `l`: `Trainable`, lead + its features [*out] or [*in]."""

    takes_many = True

    def __init__(self, base: Any, *, name: str, lead: tuple[int, ...], before: bool, layers: Layers):
        super().__init__(base, name=name, layers=layers)
        inner = innermost(base)
        self.before = before
        self.l = Trainable(jnp.ones((*lead, *_features(inner, before))), group="ia3")
        self.leading = len(lead)

    def __call__(self, x: Float[Array, "..."], *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        if self.before:
            return self.base(self._scaled(x), *args, **kwargs)
        return self._scaled(self.base(x, *args, **kwargs))

    def variable_axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"l": ("in",) if self.before else ("out",)}

    def _scaled(self, x: Array) -> Array:
        scale = self.l[...].astype(x.dtype)
        if self.adapter_ids is None:
            return x * scale
        ids, own = self.tasks_of(x), scale.ndim - 1
        if x.ndim == own:
            raise JpeftError(f"adapter_ids: an input {list(x.shape)} has no axis for a batch")
        rows = jnp.where((ids < 0).reshape(-1, *(1,) * own), 1, of_tasks(scale, ids))
        return x * rows.reshape(len(ids), *(1,) * (x.ndim - 1 - own), *rows.shape[1:])

    def fold(self, base: Any) -> nnx.Module:
        """`base` with its weight scaled (and its bias, where the output is): float32 arithmetic, cast last."""
        if self.adapter_ids is not None:
            raise NotMergeable("it holds several adapters; merge the tasks one by one")
        kind = kinds.kind_of(base)
        if isinstance(base, Wrapper) or kind is None:
            raise NotMergeable(f"{type(base).__name__} under it has no plain weight to scale")
        scale, weight, bias = self.l.get_value(), kinds.weight(base), getattr(base, "bias", None)
        lead, own = scale.shape[: self.leading], scale.shape[self.leading :]
        others = (1,) * (weight.get_value().ndim - scale.ndim)
        spread = scale.reshape(*lead, *own, *others) if self.before else scale.reshape(*lead, *others, *own)
        self._set(base, kinds.KINDS[kind][0], weight, spread)
        if bias is not None and not self.before:
            self._set(base, "bias", bias, scale)
        return base

    def _set(self, base: Any, name: str, variable: nnx.Variable, scale: Array) -> None:
        value = variable.get_value()
        chosen = value if self.layers is None else value[jnp.array(self.layers)]
        made = (chosen.astype(jnp.float32) * scale).astype(value.dtype)
        whole = made if self.layers is None else value.at[jnp.array(self.layers)].set(made)
        setattr(base, name, variable.replace(whole))


def _features(layer: Any, before: bool) -> tuple[int, ...]:
    """The shape of one layer's l."""
    if kinds.kind_of(layer) is nnx.Linear:
        features_in, features_out = kinds.own_shape(layer)
        return (features_in,) if before else (features_out,)
    if layer.batch_axis:
        raise JpeftError(f"IA3: LinearGeneral with batch_axis={dict(layer.batch_axis)} cannot be rescaled; exclude it")
    if not before:
        return tuple(layer.out_features)
    if tuple(layer.axis) != tuple(range(-len(layer.in_features), 0)):
        raise JpeftError(f"IA3: LinearGeneral over axes {tuple(layer.axis)}, which are not the last; exclude it")
    return tuple(layer.in_features)


@dataclasses.dataclass(frozen=True)
class IA3(Targeted):
    """(IA)3 (Liu et al. 2022, arXiv:2205.05638): rescales keys, values and the inner activations of the feed-forward.

    targets: linear layers whose output is rescaled; None for those that the model declares as its keys and values.
    feed_forward: linear layers whose input is rescaled; None for those that the model declares as the last of a
        feed-forward; on a model that declares none, none. `()` for none. What is in both is rescaled before.
    exclude, layers: see `jpeft.targets`.
    name: `<module path>/<name>/l`.
    """

    kind: ClassVar[str] = "ia3"
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = (nnx.Linear, nnx.LinearGeneral)
    role: ClassVar[str | None] = "key"

    targets: Any = None
    feed_forward: Any = None
    exclude: Any = ()
    layers: Any = None
    name: str = "ia3"

    def __post_init__(self) -> None:
        self.settle_targets()
        fields.settle(self, feed_forward=None if self.feed_forward is None else entries(self.feed_forward))

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        replacements: dict[surgery.Path, Callable[[Any], Any]] = {}
        for before, part in self._parts(model):
            for node, layers in part.resolve(model):
                refuse_second(node.module, self.name, node.name)
                replacements[node.path] = part._placed(node, layers, key, before)
        return surgery.replace(model, replacements)

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array, before: bool = False) -> Rescaled:
        return Rescaled(base, name=self.name, lead=lead_of(node, layers), before=before, layers=layers)

    def recorded(self, model: nnx.Module) -> tuple[Method, ...]:
        if all(lasting(entry) for entry in (*(self.targets or ()), *(self.feed_forward or ()), *self.exclude)):
            return (self,)
        names = {before: exact_names(part.resolve(model)) for before, part in self._parts(model)}
        return (
            replaced(self, targets=names.get(False, ()), feed_forward=names.get(True, ()), exclude=(), layers=None),
        )

    def _parts(self, model: nnx.Module) -> list[tuple[bool, IA3]]:
        """For the outputs and for the inputs to rescale: whether it is inputs, and this method with just those targets.

        Inputs come last, where they take the place of outputs at the same module.
        """
        declared = getattr(model, "roles", None) or {}
        targets = self.targets
        if targets is None:
            targets = (*role(model, "key", "IA3"), *role(model, "value", "IA3"))
        inner = declared.get("feed_forward_output", ()) if self.feed_forward is None else self.feed_forward
        return [
            (before, replaced(self, targets=tuple(dict.fromkeys(part)), feed_forward=()))
            for before, part in ((False, targets), (True, inner))
            if part or not before
        ]
