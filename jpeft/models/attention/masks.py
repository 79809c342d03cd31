"""Masks as arrays, and positions, of batches with padding and packed texts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpeft.visible import Visible


def padding_mask(mask: jax.Array | None) -> jax.Array | None:
    """The mask [B, 1, 1, S] that hides padded keys, from an attention mask [B, S] of zeros and ones."""
    return None if mask is None else mask.astype(bool)[:, None, None, :]


def causal_mask(queries: int, keys: int, first: jax.Array | int = 0, window: int | None = None) -> jax.Array:
    """The mask [1, 1, T, S] of queries in slots first, first + 1, ... over keys in slots 0 to S - 1.

    window: a query sees that many keys, its own included.
    """
    return Visible(causal=True, window=window, first=jnp.asarray(first)).array(queries, keys)


def token_positions(mask: jax.Array | None, segment_ids: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """Positions [B, T] counted over real tokens, from 0 in every segment; padding before the first token is at 0."""
    real = jnp.ones(shape, jnp.int32) if mask is None else mask.astype(bool).astype(jnp.int32)
    count = jnp.cumsum(real, axis=1)
    if segment_ids is not None:
        starts = jnp.concatenate([jnp.ones((shape[0], 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
        count -= jax.lax.cummax(jnp.where(starts, count - real, 0), axis=1)
    return jnp.maximum(count - 1, 0)
