"""Canonical paths: the names under which modules and variables are targeted, keyed, saved and reported.

A module and its wrappers are one node under the path of the outermost. `base` and a stack's inner name never appear, so
a weight keeps its key whether it is wrapped or not:

    layers/self_attn/q_proj/kernel        the base's kernel, [L, in, out] in a Stack
    layers/self_attn/q_proj/lora/a        variable `a` of the wrapper named `lora`

Per layer, a node of a `Stack` has an expanded name as in a list of layers: `layers.3.self_attn.q_proj`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.stack import Stack
from jpeft.surgery import Path
from jpeft.wrapper import Wrapper


@dataclasses.dataclass(frozen=True)
class Node:
    """One place in the model: the outermost module there.

    path: where it stands in the tree. parts: its canonical path, in segments. stack: the position in `parts` behind
    which a layer index belongs, and the number of layers, if the node is inside a `Stack`.
    """

    path: Path
    module: Any
    parts: tuple[str, ...]
    stack: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The canonical path, `layers/self_attn/q_proj`."""
        return "/".join(self.parts)

    @property
    def length(self) -> int | None:
        """Number of layers of the surrounding `Stack`, or None."""
        return self.stack[1] if self.stack else None

    def expanded(self, layer: int | None = None) -> str:
        """The dotted per-layer name, `layers.3.self_attn.q_proj`."""
        return ".".join(self._segments(layer))

    def layer(self, layer: int | None = None) -> int | None:
        """The layer this is in: the first index of the expanded name, or None if it has none."""
        return next((int(part) for part in self._segments(layer) if part.isdecimal()), None)

    @property
    def members(self) -> tuple[int, ...] | tuple[None]:
        """The layers of the `Stack` around the node, `(None,)` without one."""
        return tuple(range(self.stack[1])) if self.stack else (None,)

    def _segments(self, layer: int | None) -> tuple[str, ...]:
        if self.stack is None or layer is None:
            return self.parts
        at = self.stack[0]
        return (*self.parts[:at], str(layer), *self.parts[at:])

    def keys(
        self, key: jax.Array, owner: str, lead: tuple[int, ...] = (), layers: Sequence[int] | None = None
    ) -> jax.Array:
        """PRNG keys of shape `lead` for the variables of `owner` (a wrapper's name) at this node.

        Inside a `Stack` the first axis of `lead` counts its layers, or those of `layers`. A key depends on the seed,
        the path without its first index, the owner and that index alone: stacked, listed and partly adapted models
        start from the same values, whatever the order of targets.
        """
        members: Sequence[int | None] = self.members if layers is None else layers
        folds = []
        for member in members:
            segments = list(self._segments(member))
            index = next((i for i, part in enumerate(segments) if part.isdecimal()), None)
            # Layers count from 1 here, so that no layer shares its key with a module outside the layers.
            layer = 0 if index is None else int(segments.pop(index)) + 1
            folds.append((zlib.crc32("/".join([*segments, owner]).encode()), layer))
        crcs, numbers = (jnp.array(column, dtype=jnp.uint32) for column in zip(*folds, strict=True))
        made = jax.vmap(lambda crc, number: jax.random.fold_in(jax.random.fold_in(key, crc), number))(crcs, numbers)
        made = made if self.stack else made[0]
        inner = lead[made.ndim :]  # axes of a user's own scan or vmap over modules
        if not inner:
            return made
        return jax.vmap(lambda k: jax.random.split(k, inner))(made) if made.ndim else jax.random.split(made, inner)


def nodes(model: nnx.Module) -> Iterator[Node]:
    """Every module of the model by canonical path, outermost wrappers only, parents before children."""
    for path, module in surgery.modules(model):
        trail = list(_trail(model, path))
        if trail and isinstance(trail[-1][0], Wrapper) and trail[-1][1] == "base":
            continue  # the same place as its wrapper
        if isinstance(module, Stack):
            continue  # the same place as its layer
        yield Node(path, module, *_canonical(trail))


def key_of(model: nnx.Module, path: Path) -> str:
    """The canonical key of the variable (or module) at `path`."""
    return "/".join(_canonical(list(_trail(model, path)))[0])


def _trail(model: nnx.Module, path: Path) -> Iterator[tuple[Any, str | int]]:
    node: Any = model
    for name in path:
        yield node, name
        node = surgery.child(node, name)


def _canonical(trail: list[tuple[Any, str | int]]) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    parts: list[str] = []
    stack = None
    for node, name in trail:
        if isinstance(node, Stack) and name == "layer":
            if stack is not None:
                raise JpeftError(
                    f"{'/'.join(parts) or 'the model'} is a Stack inside the layers of a Stack, which methods cannot "
                    "address; keep the inner layers in an nnx.List"
                )
            stack = (len(parts), node.length)
        elif isinstance(node, Wrapper):
            parts += [] if name == "base" else [node.name, str(name)]
        else:
            parts.append(str(name))
    return tuple(parts), stack
