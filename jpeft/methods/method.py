"""What all methods share: a frozen dataclass that is called on a model."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar, TypeVar

import jax
import optax
from flax import nnx

from jpeft import surgery
from jpeft.errors import JpeftError, nearest
from jpeft.variables import freeze
from jpeft.wrapper import Wrapper

# A static attribute of the adapted model: what made it, in order.
METHODS_ATTRIBUTE = "_jpeft_methods"

_M = TypeVar("_M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Method:
    """A parameter-efficient method: `method(model, rngs=nnx.Rngs(0))` returns an adapted copy of `model`.

    The model passed in is not changed and shares its arrays with the copy, in which every `nnx.Param` that nothing
    trains is `Frozen`. Subclasses define `apply`.
    """

    kind: ClassVar[str]

    def __call__(self, model: _M, *, rngs: nnx.Rngs | jax.Array | int) -> _M:
        """An adapted copy of `model`. rngs: `nnx.Rngs`, a PRNG key or a seed; one key is drawn from it."""
        if not isinstance(model, nnx.Module):
            raise JpeftError(
                f"{type(self).__name__} adapts an nnx.Module, not a {type(model).__name__}; "
                "for a Linen model, pass an NNX model instead (flax.nnx.bridge hides its submodules)"
            )
        adapted: Any = self.apply(surgery.map_variables(model, freeze), _key(rngs))
        setattr(adapted, METHODS_ATTRIBUTE, (*applied(model), *self.recorded(model)))
        return adapted

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        """`model` (a frozen copy, free to be held on to) with this method's wrappers."""
        raise NotImplementedError(f"{type(self).__name__} defines no apply")

    def recorded(self, model: nnx.Module) -> tuple[Method, ...]:
        """The methods this one consists of, in a form that can be written to a file (predicates resolved to names)."""
        return (self,)

    def optimizer(
        self, model: nnx.Module, tx: optax.GradientTransformation, total_steps: int | None
    ) -> optax.GradientTransformation:
        """`tx` with whatever this method asks of an optimizer of `model`'s adapter; see `jpeft.optimizer`."""
        return tx

    def unfinished(self, model: nnx.Module) -> str | None:
        """What in `model`, about to be saved, shows that a part of the training did not happen; None for nothing."""
        return None

    def baked(self) -> Method:
        """The method of a model that was baked (`jpeft.bake`): without what serves training only."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready data; `from_dict` is its inverse."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"method": self.kind, **fields}

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Method:
        """A method from its configuration. Raises JpeftError on unknown fields and values of the wrong form."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in config if name not in (*known, "method")]
        if unknown:
            said = "; ".join(f"{name!r} (nearest: {', '.join(nearest(name, known, 2))})" for name in unknown)
            raise JpeftError(f"{cls.__name__}: unknown fields {said}")
        return cls(**{name: value for name, value in config.items() if name != "method"})


def applied(model: nnx.Module) -> tuple[Method, ...]:
    """The methods that made this model, in order; `()` for a model that none did."""
    return tuple(getattr(model, METHODS_ATTRIBUTE, ()))


def warn_if_unfinished(model: nnx.Module, caller: str) -> None:
    """Warns if the methods of `model`, about to be saved, see that a part of the training did not happen."""
    for method in applied(model):
        said = method.unfinished(model)
        if said is not None:
            warnings.warn(f"{caller}: {said}", stacklevel=3)


def refuse_second(module: Any, name: str, where: str) -> None:
    """Raises JpeftError if a wrapper called `name` is on `module` already."""
    while isinstance(module, Wrapper):
        if module.name == name:
            raise JpeftError(f"{where!r} has an adapter named {name!r} already; give the second one another name=")
        module = module.base


def _key(rngs: nnx.Rngs | jax.Array | int) -> jax.Array:
    if isinstance(rngs, nnx.Rngs):
        if "params" not in rngs and "default" not in rngs:
            raise JpeftError(f"rngs={rngs!r} has no stream for parameters: give nnx.Rngs(0) or nnx.Rngs(params=0)")
        return rngs.params()
    if isinstance(rngs, int) and not isinstance(rngs, bool) and -(2**31) <= rngs < 2**32:
        return jax.random.key(rngs)
    if isinstance(rngs, jax.Array) and jax.dtypes.issubdtype(rngs.dtype, jax.dtypes.prng_key) and not rngs.shape:
        return rngs
    raise JpeftError(f"rngs={rngs!r}: give nnx.Rngs(0), one jax.random.key(0) or a seed below 2**32")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "items"):
        return {name: _plain(item) for name, item in value.items()}
    if callable(value):
        raise JpeftError(f"a predicate ({getattr(value, '__name__', value)}) cannot be written to a file")
    return value
