"""Training what the model has already: all biases (BitFit), the norms, or whole modules.

    BitFit      Ben Zaken et al. 2021, arXiv:2106.10199: the biases, 0.1 % of the parameters
    NormTuning  Zhao et al. 2023, arXiv:2312.11420: scales and biases of the normalisations
    FullTuning  all parameters of the modules named: a head, an embedding ("modules to save" in Hugging Face PEFT)

A wrapper holds trained copies of the chosen variables and uses them in the place of the base's, which stay as they are:
the base comes back by `strip`, several tasks share it, and rows of one batch may use copies of different tasks.

It stands under the other wrappers of its module, whatever came first: they change what the trained weight makes. What
another method of this page trains already is left to that one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import kinds, surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.method import refuse_second
from jpeft.methods.targeted import Targeted
from jpeft.paths import Node
from jpeft.targets import Layers
from jpeft.variables import Frozen, Trainable
from jpeft.wrapper import NotMergeable, Wrapper, chain, innermost, of_tasks


class Retrained(Wrapper):
    """A module with trained copies of some of its variables.

    Each is `Trainable`, under the name and with the shape of the base's own (of the covered layers), in float32 if that
    is a floating type of less precision.
    """

    takes_many = True

    def __init__(
        self,
        base: Any,
        *,
        name: str,
        start: Mapping[str, jax.Array],
        group: str,
        stacked: bool,
        layers: Layers,
    ):
        super().__init__(base, name=name, layers=layers)
        self.copied = tuple(sorted(start))
        for own in self.copied:
            value = start[own]
            chosen = value if layers is None else value[jnp.array(layers)]
            # A copy: the step donates what trains, and the base must outlive it.
            setattr(self, own, Trainable(jnp.array(chosen, jnp.promote_types(value.dtype, jnp.float32)), group=group))
        self.leading = int(stacked)

    def __getattr__(self, attribute: str) -> Any:
        # Also a bound method of the base, such as `attend`, has to see the copies.
        if attribute.startswith("_") or attribute in ("base", "copied", "name", "layers", "adapter_ids", "leading"):
            return super().__getattr__(attribute)
        if attribute in vars(innermost(self.base)) and attribute not in self.copied:
            return getattr(self.base, attribute)  # needs no values, so also of an abstract model
        if self.adapter_ids is not None and callable(getattr(type(innermost(self.base)), attribute, None)):
            return lambda *args, **kwargs: self._by_row(attribute, *args, **kwargs)
        return getattr(self._with(self._values()) if self.adapter_ids is None else self.base, attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.adapter_ids is not None:
            return self._by_row("__call__", *args, **kwargs)
        return self._with(self._values())(*args, **kwargs)

    def _values(self) -> dict[str, jax.Array]:
        return {own: vars(self)[own][...] for own in self.copied}

    def _with(self, values: Mapping[str, jax.Array]) -> Any:
        """The base, its wrappers included, with `values` of one layer in the place of its own."""
        copy = nnx.clone(self.base)
        _set(innermost(copy), values)
        return copy

    def _by_row(self, method: str, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """Calls `method` of the base row by row, with the copies of each row's task; -1 is the base's own values."""
        ids, inner = self.tasks_of(x), innermost(self.base)
        rows = {}
        for own, tasks in self._values().items():
            kept = vars(inner).get(own)
            base = jnp.zeros(tasks.shape[1:]) if kept is None else kept[...].astype(tasks.dtype)
            missing = (ids < 0).reshape(-1, *(1,) * base.ndim)
            rows[own] = jnp.where(missing, base, of_tasks(tasks, ids))

        def one(values: Mapping[str, jax.Array], x: jax.Array) -> Any:
            return getattr(self._with(values), method)(x[None], *args, **kwargs)[0]

        return jax.vmap(one)(rows, x)

    def fold(self, base: nnx.Module) -> nnx.Module:
        """`base` with the copies written into it, cast to its own types."""
        if self.adapter_ids is not None:
            raise NotMergeable("it holds several adapters; merge the tasks one by one")
        if isinstance(base, Wrapper):
            raise NotMergeable(f"{type(base).__name__} under it is not folded")
        values = {}
        for own in self.copied:
            made, kept = vars(self)[own].get_value(), vars(base).get(own)
            if self.layers is not None and kept is not None:
                made = kept.get_value().at[jnp.array(self.layers)].set(made.astype(kept.dtype))
            elif self.layers is not None:
                raise NotMergeable(f"its new {own} covers layers {list(self.layers)} only")
            values[own] = made
        _set(base, values)
        return base


def _set(module: Any, values: Mapping[str, jax.Array]) -> None:
    """Puts `values` into variables of `module`, in their types; a missing one is made like the weight."""
    for own, value in values.items():
        kept = vars(module).get(own)
        like = kept if kept is not None else kinds.weight(module)
        made = like.replace(value.astype(like.dtype))
        if kept is None:
            vars(module)["use_bias"] = True  # nnx.Linear insists
            if made.get_metadata("out_sharding", None) is not None:  # of the weight, which has more axes
                made.set_metadata("out_sharding", None)
        setattr(module, own, nnx.data(made))


class _Retraining(Targeted):
    """What the methods of this page share; `copies` says which variables of a module they train."""

    group: ClassVar[str]

    def copies(self, module: Any) -> dict[str, jax.Array]:
        """The variables of `module` to train, by name, with the values they start from; empty to leave it alone."""
        raise NotImplementedError(f"{type(self).__name__} defines no copies")

    def accepts(self) -> Callable[[Any], bool]:
        return lambda module: isinstance(module, nnx.Module) and bool(self.copies(module))

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        replacements: dict[surgery.Path, Callable[[Any], Any]] = {}
        found = self.resolve(model)
        for node, layers in found:
            refuse_second(node.module, self.name, node.name)
            if self._start(node, layers):
                # Under the wrappers that are there: what they make of a weight, they make of its trained copy.
                replacements[(*node.path, *("base" for _ in chain(node.module)))] = self._placed(node, layers, key)
        if found and not replacements:
            raise JpeftError(f"{type(self).__name__}: all that its targets name is trained already by another method")
        return surgery.replace(model, replacements)

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> Retrained:
        start = self._start(node, layers)
        return Retrained(
            base, name=self.name, start=start, group=self.group, stacked=node.stack is not None, layers=layers
        )

    def _start(self, node: Node, layers: Layers) -> dict[str, jax.Array]:
        """The copies for `node` but for those that a method trains already; another copy would never be used."""
        module = innermost(node.module)
        start, kind = self.copies(module), kinds.kind_of(module)
        keeper = next((one.name for one in chain(node.module) if one.keeps_weight), None)
        if keeper is not None and kind is not None and kinds.KINDS[kind][0] in start:
            raise JpeftError(
                f"{type(self).__name__}: {keeper!r} on {node.name!r} counts on a weight that stays; exclude this module"
            )
        for other in (one for one in chain(node.module) if isinstance(one, Retrained)):
            twice = [own for own in other.copied if own in start]
            if other.layers is None or (layers is not None and set(layers) <= set(other.layers)):
                start = {own: value for own, value in start.items() if own not in twice}
            elif twice and (layers is None or set(layers) & set(other.layers)):
                raise JpeftError(
                    f"{type(self).__name__}: {other.name!r} trains {', '.join(twice)} of {node.name!r} in layers "
                    f"{list(other.layers)} already; give layers= without these"
                )
        return start


def parameters(module: Any) -> dict[str, jax.Array]:
    """The parameters that `module` itself holds and that nothing trains yet."""
    return {
        name: variable.get_value()
        for name, variable in vars(module).items()
        if isinstance(variable, nnx.Param | Frozen)
        and not isinstance(variable, Trainable)
        and jnp.issubdtype(variable.dtype, jnp.floating)
    }


@dataclasses.dataclass(frozen=True)
class BitFit(_Retraining):
    """Trains biases only (Ben Zaken et al. 2021, arXiv:2106.10199).

    targets, exclude, layers: whose biases; see `jpeft.targets`. Names may also mean a module around ("attention");
        the default is every bias of the model. The paper's smaller set on BERT: `["query", "intermediate.dense"]`.
    new_biases: linear layers without a bias get one that starts at zero; otherwise a model without any is refused.
    name: `<module path>/<name>/bias`.
    """

    kind: ClassVar[str] = "bitfit"
    group: ClassVar[str] = "bias"

    targets: Any = ".*"
    exclude: Any = ()
    layers: Any = None
    new_biases: bool = False
    name: str = "bitfit"

    def __post_init__(self) -> None:
        self.settle_targets()
        fields.check_switch(self, "new_biases")

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        try:
            return super().apply(model, key)
        except JpeftError as error:
            if self.new_biases or "matches nothing" not in str(error):
                raise
            raise JpeftError(f"{error}; to train new biases on linear layers that have none: new_biases=True") from None

    def copies(self, module: Any) -> dict[str, jax.Array]:
        found = {name: value for name, value in parameters(module).items() if name == "bias"}
        if found or not self.new_biases or type(module) is not nnx.Linear or module.bias is not None:
            return found
        kernel = module.kernel
        if isinstance(kernel, Trainable):
            return {}
        value = kernel.get_value()
        return {"bias": jnp.zeros((*value.shape[:-2], value.shape[-1]), value.dtype)}


@dataclasses.dataclass(frozen=True)
class NormTuning(_Retraining):
    """Trains the normalisations only, scales and biases (Zhao et al. 2023, arXiv:2312.11420).

    targets: which modules; None for all that the model declares as its norms.
    name: `<module path>/<name>/scale` and `/bias`.
    """

    kind: ClassVar[str] = "norm_tuning"
    group: ClassVar[str] = "norm"
    role: ClassVar[str | None] = "norm"

    targets: Any = None
    exclude: Any = ()
    layers: Any = None
    name: str = "norm"

    def __post_init__(self) -> None:
        self.settle_targets()

    def copies(self, module: Any) -> dict[str, jax.Array]:
        return {} if kinds.kind_of(module) is not None else parameters(module)


@dataclasses.dataclass(frozen=True)
class FullTuning(_Retraining):
    """Trains all parameters of the modules named, beside another method's few: a head, an embedding, the last layer.

    targets: names, expressions, types or predicates (`jpeft.targets`); a name may mean a module around, so "pooler" is
        everything in it. A tied head follows its embedding.
    name: `<module path>/<name>/kernel`, ...
    """

    kind: ClassVar[str] = "full_tuning"
    group: ClassVar[str] = "full"

    targets: Any
    exclude: Any = ()
    layers: Any = None
    name: str = "full"

    def __post_init__(self) -> None:
        self.settle_targets()

    def copies(self, module: Any) -> dict[str, jax.Array]:
        return {} if isinstance(module, kinds.Packed) else parameters(module)
