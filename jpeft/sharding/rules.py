"""From the path of a weight to its `PartitionSpec`, and from there to those of everything that belongs to the weight.

A rule is an entry as in targets (the same matcher) with the spec of the trailing axes of what it names: of a layer,
those of its weight, (in, out); its bias follows the output. Leading (layer) axes are whole. So one rule serves stacked,
listed, wrapped, quantised and plain layers.

A model declares its rules as `sharding_rules`. Rules given by the caller come first; what no rule names keeps the
layout in its variable's metadata (`out_sharding`, as `nnx.with_partitioning` leaves it), and else is whole on every
device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jpeft import kinds, targets
from jpeft.errors import JpeftError, nearest
from jpeft.paths import Node
from jpeft.quant import QuantizedLinear, partition_specs
from jpeft.sharding.mesh import AXES
from jpeft.variables import AdapterIds, DropoutKey
from jpeft.wrapper import Wrapper, innermost

Rules: TypeAlias = Mapping[str, PartitionSpec]
Axes: TypeAlias = tuple[Any, ...]  # one entry per axis: None, a mesh axis, or several

# What a wrapper calls its own axes, where they are not those of the layer it adapts. `features`: of the residual
# stream; `width`: between two products of an adapter, cut as the feed-forward's is; `heads`: of keys and values.
LOGICAL = {"features": "fsdp", "width": "tensor", "heads": "tensor"}


class Resolver:
    """The specs of one model's variables under the rules of the model and of the caller.

    Raises JpeftError for a rule that is no PartitionSpec; `check` reports those of the caller that matched nothing.
    """

    def __init__(self, model: nnx.Module, mesh: Mesh, rules: Rules | None):
        own: Any = getattr(model, "sharding_rules", None) or {}
        self.mesh = mesh
        self.prefix = targets.prefix_of(model)
        self.given = dict(rules or {})
        for entry, spec in self.given.items():
            if not isinstance(entry, str) or not isinstance(spec, PartitionSpec):
                raise JpeftError(f"rules: {entry!r}: {spec!r}; give a name or regular expression and a PartitionSpec")
        self.table: dict[str, PartitionSpec] = {**self.given, **{k: v for k, v in own.items() if k not in self.given}}
        self.unused = set(self.given)
        self.seen: list[str] = []

    def spec(self, node: Node, module: Any, name: str, variable: Any, shape: tuple[int, ...]) -> PartitionSpec:
        """Of the variable `name` of `module`, which stands at `node`, under its wrappers or as one of them."""
        if isinstance(variable, DropoutKey | AdapterIds | nnx.RngState):
            return PartitionSpec()
        if isinstance(module, Wrapper):
            return self._adapter(node, module, name, shape)
        where = f"{node.name}/{name}" if node.name else name
        self.seen += [node.name, where]
        if isinstance(module, QuantizedLinear):
            try:
                return partition_specs(module, PartitionSpec(*self._weight(node, module)), self.mesh)[name]
            except JpeftError as error:
                raise JpeftError(f"{node.name!r}: {error}; or give rules={{{node.name!r}: P()}}") from None
        axes: Axes | None = None
        kind = kinds.kind_of(module)
        if kind is not None and name == kinds.KINDS[kind][0]:
            axes = self._weight(node, module)
        elif kind is not None and name == "bias":
            axes = self._sides(node, module)[1]
        else:  # a module of another kind: a rule may name it, or one of its variables
            rule = self._rule((*self._called(node), *self._called(node, name)))
            axes = None if rule is None else self._named(rule, where)
        if axes is None or not any(axes):
            axes = self._annotated(node, variable, where) or axes
        return self._checked(axes or (), shape, where)

    def check(self) -> None:
        """Raises JpeftError naming each rule of the caller that matched nothing."""
        if self.unused:
            said = "; ".join(
                f"{entry!r} (nearest: {', '.join(nearest(entry, filter(None, self.seen), 3))})"
                for entry in sorted(self.unused)
            )
            raise JpeftError(f"rules that match nothing in the model: {said}")

    def _called(self, node: Node, name: str | None = None) -> tuple[str, ...]:
        called = dict.fromkeys(n for member in node.members for n in targets.names(node, member, self.prefix))
        return tuple(called) if name is None else tuple(f"{path}.{name}" if path else name for path in called)

    def _rule(self, called: Iterable[str]) -> PartitionSpec | None:
        called = tuple(called)
        fitting = [entry for entry in self.table if targets.matches(entry, called)]
        self.unused.difference_update(fitting)
        return self.table[fitting[0]] if fitting else None

    def _named(self, spec: Iterable[Any], where: str) -> Axes:
        """The entries of a spec, without those axes of `AXES` that this mesh does not have."""
        made: list[Any] = []
        used: set[str] = set()
        for entry in spec:
            names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
            for axis in names:
                if axis not in self.mesh.shape and axis not in AXES:
                    raise JpeftError(
                        f"{where!r}: the mesh has axes {tuple(self.mesh.shape)}, not {axis!r}; name one of them in "
                        "its rule, or P() to keep it whole"
                    )
                if axis in used:
                    raise JpeftError(f"{where!r}: {spec} names the mesh axis {axis!r} twice; an array has it once")
                used.add(axis)
            kept = tuple(axis for axis in names if self.mesh.shape.get(axis, 1) > 1)
            made.append(kept[0] if len(kept) == 1 else kept or None)
        return tuple(made)

    def _weight(self, node: Node, module: Any) -> Axes:
        """The spec of one layer's weight, an entry for each of its axes."""
        own = kinds.own_shape(module)
        rule: Iterable[Any] | None = self._rule(self._called(node))
        if rule is None:
            inner = innermost(module)
            rule = () if isinstance(inner, kinds.Packed) else self._metadata(kinds.weight(module))
        axes = self._named(rule, node.name)
        inputs, outputs = _split(module)
        if len(axes) == 2 and inputs is not None and outputs is not None and inputs + outputs == len(own):
            # (in, out) of a layer with several axes on a side: the first of each is cut.
            return (axes[0], *(None,) * (inputs - 1), axes[1], *(None,) * (outputs - 1))
        if len(axes) > len(own):
            raise JpeftError(
                f"{node.name!r}: the rule {PartitionSpec(*axes)} has {len(axes)} entries for a weight {list(own)}"
            )
        return (*axes, *(None,) * (len(own) - len(axes)))

    def _sides(self, node: Node, module: Any) -> tuple[Axes, Axes]:
        """The entries of the weight's input axes and of its output axes."""
        inputs, _ = _split(module)
        if inputs is None:
            return (), ()
        axes = self._weight(node, module)
        return axes[:inputs], axes[inputs:]

    def _adapter(self, node: Node, wrapper: Wrapper, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        named = wrapper.variable_axes().get(name)
        kind = kinds.kind_of(wrapper)
        adapts = kind is not None
        if named is None and kind is not None and name in (kinds.KINDS[kind][0], "bias"):
            named = ("out",) if name == "bias" else ("in", "out")  # a trained copy of what the layer has
        if not named:
            return PartitionSpec()
        inputs, outputs = self._sides(node, wrapper) if adapts else ((), ())
        if adapts and not inputs and {"in", "out"} & set(named):
            return PartitionSpec()
        axes: list[Any] = []
        for entry in named:
            if entry in ("in", "out"):
                axes += inputs if entry == "in" else outputs
            else:
                axes += self._named((LOGICAL[entry] if entry else None,), node.name)
        if len(axes) > len(shape):
            return PartitionSpec()
        # Small arrays: where an axis does not divide, whole is no loss.
        lead = len(shape) - len(axes)
        fitting = [e if shape[lead + i] % self._size(e) == 0 else None for i, e in enumerate(axes)]
        return _padded(fitting, len(shape))

    def _annotated(self, node: Node, variable: Any, where: str) -> Axes | None:
        found = self._metadata(variable)
        return self._named(found, where) if found else None

    def _metadata(self, variable: Any) -> tuple[Any, ...]:
        metadata = variable.get_metadata() if isinstance(variable, nnx.Variable) else {}
        found = metadata.get("out_sharding")
        if found is None:
            return ()
        aliases = dict(metadata.get("sharding_rules") or ())
        spec = getattr(found, "spec", found)
        return tuple(aliases.get(entry, entry) if isinstance(entry, str) else entry for entry in spec)

    def _size(self, entry: Any) -> int:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        return math.prod(self.mesh.shape[axis] for axis in names)

    def _checked(self, axes: Axes, shape: tuple[int, ...], where: str) -> PartitionSpec:
        if len(axes) > len(shape):
            raise JpeftError(f"{where!r}: the rule {PartitionSpec(*axes)} has {len(axes)} entries for {list(shape)}")
        for index, entry in enumerate(axes, start=len(shape) - len(axes)):
            size = self._size(entry)
            if shape[index] % size:
                works = [n for n in range(1, shape[index] + 1) if shape[index] % n == 0]
                said = ", ".join(map(str, works[:12])) + (", ..." if len(works) > 12 else "")
                module = where.rpartition("/")[0] or where
                raise JpeftError(
                    f"{where!r} {list(shape)}: axis {index} of {shape[index]} cannot be cut into {size} shards along "
                    f"{entry!r}; sizes that work: {said}. Choose another mesh, or keep it whole with "
                    f"rules={{{module!r}: P()}}"
                )
        return _padded(axes, len(shape))


def _padded(axes: Iterable[Any], ndim: int) -> PartitionSpec:
    axes = tuple(axes)
    return PartitionSpec(*(None,) * (ndim - len(axes)), *axes) if any(axes) else PartitionSpec()


def _split(module: Any) -> tuple[int | None, int | None]:
    """How many of the weight's own axes are inputs and how many outputs; None where a layer mixes them."""
    kind, inner = kinds.kind_of(module), innermost(module)
    if kind in (nnx.Linear, nnx.Embed):
        return 1, 1
    if kind is nnx.LinearGeneral and not inner.batch_axis:
        return len(inner.in_features), len(inner.out_features)
    return None, None
