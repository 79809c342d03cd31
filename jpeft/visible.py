"""Which keys a query sees, as rules: what models hand to attention functions, and methods change on the way."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, eq=False)
class Visible:
    """Which of S keys each of T queries sees, said by rules: an array of it would have T times S entries.

    Keys stand in slots: 0, 1, ... behind `prefix` keys that every query sees.

    causal: a query in slot t sees slots 0 to t. window: and of those only that many, its own included.
    real: bool [B, slots], False for padding, which nobody sees. segments: int [B, T] (as many queries as slots): a
    query sees its own segment only. first: the slot of the first query, int []; None: 0. slides: bool [], whether the
    window is in force; None: it is.
    """

    causal: bool = False
    window: int | None = None
    prefix: int = 0
    real: jax.Array | None = None
    segments: jax.Array | None = None
    first: jax.Array | None = None
    slides: jax.Array | None = None

    def behind(self, count: int) -> Visible:
        """With `count` more keys in front."""
        return dataclasses.replace(self, prefix=self.prefix + count)

    def pairs(self, query: jax.Array, key: jax.Array, *, sliding: bool = True) -> jax.Array:
        """Whether order and window let queries in these slots see the keys in these, which broadcast against them."""
        ahead = key - query
        seen = ahead <= (0 if self.causal else 2**30)
        if self.window is not None and sliding:
            seen &= ahead > -self.window
        return seen

    def array(self, queries: int, keys: int, start: jax.Array | int = 0) -> jax.Array:
        """The mask, bool [B or 1, 1, queries, keys], of the queries from number `start` on."""
        key, number = jnp.arange(keys) - self.prefix, start + jnp.arange(queries)
        query = number if self.first is None else self.first + number
        seen = self.pairs(query[:, None], key[None, :])
        if self.slides is not None:
            seen |= self.pairs(query[:, None], key[None, :], sliding=False) & ~self.slides
        seen = seen[None, None]
        if self.real is not None:
            seen &= self._placed(self.real.astype(bool))[:, None, None, :]
        if self.segments is not None:
            # Queries may be filled up behind the last: a slice that reached over the end would be moved back.
            filled = jnp.pad(self.segments, ((0, 0), (0, queries)))
            own = jax.lax.dynamic_slice_in_dim(filled, start, queries, axis=1)
            seen &= own[:, None, :, None] == self._placed(self.segments)[:, None, None, :]
        return seen | (key < 0) if self.prefix else seen

    def _placed(self, slots: jax.Array) -> jax.Array:
        return jnp.pad(slots, ((0, 0), (self.prefix, 0)))
