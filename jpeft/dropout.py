"""Dropout whose key is a variable with a layer axis, so that it can be scanned, rematerialised and replayed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jpeft.variables import DropoutKey


class Dropout(nnx.Module):
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate) while training.

    `jpeft.combine(..., dropout=key)` fills `key` from the module's path and layer and switches to training; otherwise
    the module returns its input. (`model.train()` of NNX does not switch it on: there would be no key.)
    """

    def __init__(self, rate: float, lead: tuple[int, ...] = ()):
        self.rate = rate
        self.active = False
        self.key = DropoutKey(jnp.broadcast_to(jax.random.key(0), lead))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if not self.active or self.rate == 0:
            return x
        keep = jax.random.bernoulli(self.key[...], 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))
