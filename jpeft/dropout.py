"""Dropout whose key is a variable with a layer axis, so that it can be scanned, rematerialised and replayed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jpeft.variables import DropoutKey


class Dropout(nnx.Module):
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate) while training.

    `jpeft.combine(..., dropout=key)` fills `key` from the module's path and layer and switches to training; otherwise
    the module returns its input. (`model.train()` of NNX does not switch it on: there would be no key.)

    common: all modules of which this holds get one key, so that they draw alike, whatever their path and layer.
    """

    common: bool = False

    def __init__(self, rate: float, lead: tuple[int, ...] = ()):
        self.rate = rate
        self.active = False
        self.key = DropoutKey(jnp.broadcast_to(jax.random.key(0), lead))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if not self.active or self.rate == 0:
            return x
        keep = jax.random.bernoulli(self.key[...], 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))


class LayerDropout(Dropout):
    """Leaves out the lowest n layers while training, n drawn anew from 0 to `most` and the same wherever it is asked.

    Called with the number of a layer, it returns 0.0 for a layer left out and 1.0 for the others, so what is left out
    is a value and not a program.
    """

    common = True

    def __init__(self, most: int, lead: tuple[int, ...] = ()):
        super().__init__(0.0, lead)
        self.most = most

    def __call__(self, depth: Int[Array, "..."]) -> Float[Array, "..."]:
        if not self.active:
            return jnp.ones(depth.shape)
        return (depth >= jax.random.randint(self.key[...], (), 0, self.most + 1)).astype(jnp.float32)
