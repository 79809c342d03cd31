"""`Stack`: layers of identical structure whose variables carry a leading layer axis, run by `jax.lax.scan`.

The compiler sees one layer instead of N: compile time does not grow with depth, and step temporaries grow by one layer
input per layer when the body is rematerialised.

A layer is any module called as `carry = layer(carry, index, *args, **kwargs)`: `carry` is a pytree that every layer
passes on (activations, a KV cache written in place at `index`), `index` the layer's number (traced inside a scan),
`args` and `kwargs` are the same for all layers.

Methods restricted to some layers leave the stack whole. Their wrappers carry a static tuple `layers` and variables
whose leading axis counts only those; the stack then runs one scan per maximal run of equal activity, without the
wrappers that are inactive there. Layers before the first adapted one need no backward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.surgery import Path
from jpeft.wrapper import Wrapper, observer

# What a body without rematerialisation does not keep for its backward pass: base weights read by layer index, and the
# cheap changes of layout behind such a read. Kept, they would pile up to a copy of the base.
_READ_AGAIN = frozenset({"dynamic_slice", "squeeze", "reshape", "transpose", "convert_element_type"})

Remat: TypeAlias = bool | Literal["offload"]
_INPUT = "layer input"
_TO_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)


def _keep(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _READ_AGAIN


def _is_shared(path: Path, variable: Any) -> bool:
    return isinstance(variable, nnx.Variable) and variable.get_metadata().get("shared", False)


def _split(layer: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """A stacked layer as (graphdef, variables with a layer axis, variables with `shared=True`, which have none)."""
    parts: Any = nnx.split(layer, _is_shared, ...)
    graphdef, shared, stacked = parts
    return graphdef, stacked, shared


class Stack(nnx.Module):
    """`length` layers as one `layer` whose variables have a leading axis of that length.

    remat: recompute each layer in the backward pass instead of keeping its intermediates; "offload": and keep its input
    meanwhile in the memory of the host.
    """

    def __init__(self, layer: nnx.Module, length: int, *, remat: Remat = False):
        self.layer = layer
        self.length = length
        self.remat = remat

    @classmethod
    def create(
        cls, make: Callable[[nnx.Rngs], nnx.Module], length: int, *, rngs: nnx.Rngs, remat: Remat = False
    ) -> Stack:
        """A stack of `length` layers, each `make(rngs)` with a key of its own. Works under `nnx.eval_shape`."""
        if length < 1:
            raise JpeftError(f"Stack.create: length={length}; give at least one layer")
        keys = jax.random.split(rngs.params(), length)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        state = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys)
        return cls(nnx.merge(graphdef, state), length, remat=remat)

    @classmethod
    def from_layers(cls, layers: Sequence[nnx.Module], *, remat: Remat = False) -> Stack:
        """Stacks layers of identical structure (their arrays are copied into the stacked ones)."""
        if not layers:
            raise JpeftError("Stack.from_layers: no layers")
        graphdefs, states = zip(*(nnx.split(layer) for layer in layers), strict=True)
        odd = [i for i, other in enumerate(graphdefs) if other != graphdefs[0]]
        if odd:
            raise JpeftError(f"layers {odd} differ in structure from layer 0: a Stack needs identical layers")
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return cls(nnx.merge(graphdefs[0], state), len(layers), remat=remat)

    def unstack(self) -> nnx.List:
        """The same layers as a plain `nnx.List` (copies; for models that want to treat layers one by one)."""
        return nnx.List([self.at(index) for index in range(self.length)])

    def at(self, index: int) -> Any:
        """Layer `index` as a module (copies of its arrays), without the wrappers that do not cover it.

        Raises JpeftError if there is no layer of that number.
        """
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise JpeftError(f"at: layer {index} of {self.length}; they count from 0")
        graphdef, shared, rows, stacked = self._active(index, index + 1)
        own, whole = jax.tree.map(lambda a: a[0], rows), jax.tree.map(lambda a: a[index], stacked)
        # Shared values get Variables of their own, too: tree mode lets no two layers of a list hold the same one.
        layer = nnx.merge(graphdef, jax.tree.map(lambda a: a, shared), own, whole)
        for _, wrapper in _wrappers(layer):
            wrapper.layers = None
            if vars(wrapper).get("leading"):
                wrapper.leading -= 1
        return layer

    def __call__(self, carry: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs `carry` through all layers."""
        if (seen := observer()) is not None:
            for seen.layer in range(self.length):
                carry = self.at(seen.layer)(carry, seen.layer, *args, **kwargs)
            seen.layer = None
            return carry
        partial = [set(wrapper.layers) for _, wrapper in _wrappers(self.layer) if wrapper.layers is not None]
        if not partial:
            graphdef, stacked, shared = _split(self.layer)
            indices = jnp.arange(self.length, dtype=jnp.int32)

            def body(carry: Any, xs: Any) -> tuple[Any, None]:
                index, state = xs
                return nnx.merge(graphdef, state, shared)(carry, index, *args, **kwargs), None

            return jax.lax.scan(self._recomputed(body) if self.remat else body, carry, (indices, stacked))[0]
        for start, stop in runs(self.length, partial):
            carry = self._run(carry, start, stop, args, kwargs)
        return carry

    def _active(self, start: int, stop: int) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
        """Layers [start, stop), over which the same wrappers are active, without the others.

        As (graphdef, shared variables, the wrappers' rows for these layers, variables of all layers).
        """

        def inactive(module: Any) -> bool:
            return isinstance(module, Wrapper) and module.layers is not None and start not in module.layers

        layer = surgery.rewrite(self.layer, lambda module: module.base if inactive(module) else module)
        owners = {path: wrapper.layers for path, wrapper in _wrappers(layer) if wrapper.layers is not None}

        def owner(path: Path) -> tuple[int, ...] | None:
            return next((own for at, own in owners.items() if path[: len(at)] == at and path[len(at)] != "base"), None)

        parts: Any = nnx.split(layer, _is_shared, lambda path, _: owner(path) is not None, ...)
        graphdef, shared, compact, stacked = parts
        rows = []
        for path, variable in nnx.to_flat_state(compact):
            first = (owner(path) or ()).index(start)
            rows.append((path, jax.tree.map(lambda a, first=first: a[first : first + stop - start], variable)))
        return graphdef, shared, nnx.from_flat_state(rows), stacked

    def _run(self, carry: Any, start: int, stop: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graphdef, shared, rows, stacked = self._active(start, stop)

        def body(carry: Any, xs: Any) -> tuple[Any, None]:
            index, own = xs
            whole = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stacked)
            return nnx.merge(graphdef, shared, own, whole)(carry, index, *args, **kwargs), None

        xs = (jnp.arange(start, stop, dtype=jnp.int32), rows)
        return jax.lax.scan(self._recomputed(body) if self.remat else jax.checkpoint(body, policy=_keep), carry, xs)[0]

    def _recomputed(self, body: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The body of a scan, which runs again for its backward pass."""
        if self.remat != "offload":
            return jax.checkpoint(body)

        def named(carry: Any, xs: Any) -> Any:
            return body(jax.tree.map(lambda array: checkpoint_name(array, _INPUT), carry), xs)

        return jax.checkpoint(named, policy=_TO_HOST)


def _wrappers(layer: nnx.Module) -> list[tuple[Path, Wrapper]]:
    return [(path, module) for path, module in surgery.modules(layer) if isinstance(module, Wrapper)]


def runs(length: int, covered: Sequence[set[int]]) -> list[tuple[int, int]]:
    """Maximal ranges [start, stop) of layers over which each set of `covered` is either entirely in or out."""
    active = [tuple(index in layers for layers in covered) for index in range(length)]
    starts = [index for index in range(length) if index == 0 or active[index] != active[index - 1]]
    return list(zip(starts, [*starts[1:], length], strict=True))


def offload(model: nnx.Module) -> Any:
    """A copy of `model`, sharing its arrays, whose stacks recompute their layers from inputs kept in the host's memory.

    For steps whose layer inputs (batch x tokens x width each) do not fit the device: they travel to the host in the
    forward pass and back in the backward pass. The backend needs a memory of kind "pinned_host", as GPUs and TPUs have.
    Raises JpeftError if there is no `Stack` in the model.
    """
    found = 0

    def changed(module: Any) -> Any:
        nonlocal found
        if not isinstance(module, Stack):
            return module
        found += 1
        return Stack(module.layer, module.length, remat="offload")

    made = surgery.rewrite(model, changed)
    if not found:
        raise JpeftError(f"offload: {type(model).__name__} keeps its layers in no jpeft.Stack, which it is done for")
    return made


def run_layers(layers: Any, carry: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs a `Stack` or any sequence of layers (`nnx.List`)."""
    if isinstance(layers, Stack):
        return layers(carry, *args, **kwargs)
    for index, layer in enumerate(layers):
        carry = layer(carry, index, *args, **kwargs)
    return carry
