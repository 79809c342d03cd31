"""Several methods as one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
from flax import nnx

from jpeft.errors import JpeftError
from jpeft.methods.method import Method


@dataclasses.dataclass(frozen=True)
class Compose(Method):
    """Applies `methods` in order; a later one wraps what an earlier one made."""

    kind: ClassVar[str] = "compose"

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        odd = [method for method in self.methods if not isinstance(method, Method)]
        if odd or not self.methods:
            given = repr(odd[0]) if odd else "nothing"
            raise JpeftError(f"compose takes methods such as jpeft.LoRA(...), not {given}")

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        for method in self.methods:
            model = method.apply(model, key)
        return model

    def recorded(self, model: nnx.Module) -> tuple[Method, ...]:
        return tuple(part for method in self.methods for part in method.recorded(model))


def compose(*methods: Method) -> Compose:
    """One method that applies all of `methods` in order, from one key."""
    return Compose(methods)
