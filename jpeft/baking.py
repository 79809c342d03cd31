"""`bake`: an adapted model without the parts that serve training only."""

from __future__ import annotations

from typing import Any

from flax import nnx

from jpeft import surgery
from jpeft.methods.method import METHODS_ATTRIBUTE, applied
from jpeft.wrapper import Wrapper


def bake(model: nnx.Module) -> Any:
    """A copy of `model` in which what an encoder or MLP makes of a prompt is stored in its place.

    It computes the same and costs less at every call, most of all where a text is decoded token by token
    (`jpeft.generate` bakes by itself). A model without such parts is copied as it is. To train on, keep the original:
    the copy has no encoder. Both can be saved and loaded.
    """
    made = surgery.rewrite(model, lambda module: module.baked() if isinstance(module, Wrapper) else module)
    if applied(model):
        setattr(made, METHODS_ATTRIBUTE, tuple(method.baked() for method in applied(model)))
    return made
