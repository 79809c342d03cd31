"""What every method puts around a module: the wrapped module as `base`, its own variables beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft.errors import JpeftError
from jpeft.variables import AdapterIds


class Seen(dict[str, jax.Array]):
    """What is shown while `observing`, by name. layer: the one that runs, set by the `Stack` around it."""

    layer: int | None = None


_seen: ContextVar[Seen | None] = ContextVar("seen", default=None)


@contextlib.contextmanager
def observing() -> Iterator[Seen]:
    """Collects what wrappers show in this block; see `jpeft.observe`."""
    seen = Seen()
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def observer() -> Seen | None:
    """What collects at present, if anything does."""
    return _seen.get()


_OWN = ("base", "name", "layers", "adapter_ids", "leading")


class Wrapper(nnx.Module):
    """A module in the place of another, which it holds as `base`.

    Anything a wrapper does not define itself (`in_features`, `kernel`, `attend`, ...) is the base's, so wrappers nest
    and callers need not know of them. `layers` names the layers of the surrounding `Stack` that the wrapper's own
    variables cover, in order; `None` means all of them, or that there is no `Stack`.

    A wrapper that is a function of the base's weight says so by defining `fold`.
    """

    # Whether variables of several tasks may be stacked on an axis behind the layer axis, one chosen per row (`multi`).
    takes_many: ClassVar[bool] = False

    # Whether it keeps what it made of the weight under it when it was put there, so that this must not train.
    keeps_weight: ClassVar[bool] = False

    # Whether a layer may go without: `jpeft.drop_adapters` takes it away, where others are part of what was trained.
    droppable: ClassVar[bool] = False

    place: tuple[str, str] = ("", "")  # while observed: its canonical path, before and behind the layer's number

    positions_taken: int = 0  # how many positions the wrapper takes before the first token
    virtual_tokens: int = 0  # how many ids above the vocabulary an embedding's wrapper knows
    position: Any = None  # where they go in: see `jpeft.virtual_tokens`

    base: Any
    name: str
    layers: tuple[int, ...] | None
    adapter_ids: AdapterIds | None
    leading: int  # how many axes of its variables count layers

    def __init__(self, base: Any, *, name: str, layers: tuple[int, ...] | None = None):
        self.base = nnx.data(base) if isinstance(base, nnx.Pytree) else base
        self.name = name
        self.layers = layers
        self.adapter_ids = nnx.data(None)

    def __getattr__(self, attribute: str) -> Any:
        # Called only for what normal look-up does not find. Private names belong to NNX and to Python's protocols.
        if attribute.startswith("_") or attribute in _OWN:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}")
        return getattr(self.base, attribute)

    def observed(self, name: str, value: jax.Array) -> jax.Array:
        """`value`, which `jpeft.observe` returns under this name."""
        seen = observer()
        if seen is not None:
            layer = [] if seen.layer is None else [str(seen.layer)]
            seen["/".join(part for part in (self.place[0], *layer, self.place[1], name) if part)] = value
        return value

    def tasks_of(self, batch: jax.Array) -> jax.Array:
        """`adapter_ids` [B], the task of each row of `batch` [B, ...], -1 for none. Only with several tasks."""
        assert self.adapter_ids is not None
        ids: jax.Array = self.adapter_ids[...]
        if ids.shape != batch.shape[:1]:
            raise JpeftError(f"adapter_ids: expected one per row, {list(batch.shape[:1])}, found {list(ids.shape)}")
        return ids

    def variable_axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """What the trailing axes of its variables run along, by variable; for a mesh (`jpeft.shard`).

        "in" and "out" are the input and output axes of the layer under it, "features" those of the residual stream,
        "width" what is between two products of its own, "heads" the heads of keys and values; None, and the axes of
        variables that are not named, are whole on every device.
        """
        return {}

    def penalty(self) -> jax.Array | None:
        """What the wrapper adds to the loss, a float32 scalar summed over its layer axes; None for nothing."""
        return None

    def baked(self) -> Wrapper:
        """What computes the same without the parts that are needed for training only; see `jpeft.bake`."""
        return self

    def fold(self, base: nnx.Module) -> nnx.Module:
        """`base` (which the wrappers inside this one were folded into) as one plain module that computes the same.

        Raises NotMergeable where the mathematics does not allow it.
        """
        raise NotMergeable(f"{type(self).__name__} is not a function of the weight it wraps")


class NotMergeable(Exception):
    """Why one wrapper cannot be folded into its base; `jpeft.merge` collects these into one JpeftError."""


def of_tasks(values: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows of `values` [tasks, ...] for the tasks `ids` of a batch: [B, ...].

    Those of task 0 for -1, where the caller puts the base; not a number for a task that there is not, whose row must
    not be answered with the adapter of another.
    """
    return values.at[jnp.maximum(ids, 0)].get(mode="fill", fill_value=jnp.nan)


def at(module: Any, name: str) -> Any:
    """The wrapper called `name` around a module, which has one."""
    while module.name != name:
        module = module.base
    return module


def chain(module: Any) -> list[Wrapper]:
    """The wrappers around a module, from the outermost inwards."""
    found = []
    while isinstance(module, Wrapper):
        found.append(module)
        module = module.base
    return found


def innermost(module: Any) -> Any:
    """The module under all wrappers."""
    while isinstance(module, Wrapper):
        module = module.base
    return module
