"""Attention of one block of queries after another, for texts whose scores as a whole would fill the memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jpeft.visible import Visible

SIZE = 256  # queries at a time


def attend_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | Visible | None,
    bias: jax.Array | None,
    scale: float | None,
) -> jax.Array:
    """Attention of queries [B, T, N, H] over keys and values [B, S, K, H]; [B, T, N, H] results.

    mask, bias: as in `Attention`. Scores exist for `SIZE` queries at a time, forwards and backwards, where they are
    computed again: memory grows with S, not with T times S, as long as mask and bias have no such size themselves.
    """
    queries = q.shape[1]
    if queries <= SIZE:
        seen = mask.array(queries, k.shape[1]) if isinstance(mask, Visible) else mask
        return jax.nn.dot_product_attention(q, k, v, mask=seen, bias=bias, scale=scale)
    count = -(-queries // SIZE)
    blocks = jnp.moveaxis(filled(q, 1, count * SIZE).reshape(q.shape[0], count, SIZE, *q.shape[2:]), 1, 0)

    def rows(array: jax.Array | None, start: jax.Array) -> jax.Array | None:
        if array is None or array.shape[2] == 1:
            return array
        return jax.lax.dynamic_slice_in_dim(filled(array, 2, count * SIZE), start, SIZE, axis=2)

    @jax.checkpoint
    def block(start: jax.Array, part: jax.Array) -> jax.Array:
        seen = mask.array(SIZE, k.shape[1], start) if isinstance(mask, Visible) else rows(mask, start)
        return jax.nn.dot_product_attention(part, k, v, mask=seen, bias=rows(bias, start), scale=scale)

    out = jax.lax.map(lambda given: block(*given), (jnp.arange(count) * SIZE, blocks))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], count * SIZE, *q.shape[2:])[:, :queries]


def filled(array: jax.Array, axis: int, size: int) -> jax.Array:
    """With zeros behind along `axis`, up to `size`."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)
