"""Virtual tokens in a model: where they stand, and what they do to the positions of the real ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft import surgery
from jpeft.wrapper import Wrapper


def position_offset(model: nnx.Module) -> int | jax.Array:
    """The position of a model's first real token: how many positions its wrappers take before the tokens.

    A whole number, or one per row, [B, 1], where rows use different adapters.
    """
    found = [_offset(module) for _, module in surgery.modules(model) if isinstance(module, Wrapper)]
    if all(isinstance(number, int) for number in found):
        return max(found, default=0)
    most = found[0]
    for number in found[1:]:
        most = jnp.maximum(most, number)
    return most


def most_positions(model: nnx.Module) -> int:
    """The largest `position_offset` of any row."""
    return max((_taken(module) for _, module in surgery.modules(model) if isinstance(module, Wrapper)), default=0)


def _taken(module: Any) -> int:
    """By a wrapper and those inside it."""
    return module.positions_taken + _taken(module.base) if isinstance(module, Wrapper) else 0


def _offset(module: Any) -> Any:
    """The same, with 0 for rows that use the base alone."""
    if not isinstance(module, Wrapper):
        return 0
    own: Any = module.positions_taken
    if own and module.adapter_ids is not None:
        own = jnp.where(module.adapter_ids[...] < 0, 0, own)[:, None]
    return own + _offset(module.base)
