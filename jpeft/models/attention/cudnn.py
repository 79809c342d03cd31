"""cuDNN's fused attention on NVIDIA GPUs, as `jax.nn.dot_product_attention` calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.visible import Visible


def cudnn_takes(attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether cuDNN can do this and its gradient: JAX says what it or the GPU cannot do before anything is computed."""
    if q.dtype not in (jnp.float16, jnp.bfloat16) or q.shape[1] == 1:
        return False
    try:
        jax.eval_shape(lambda *given: jax.vjp(attend, *given)[0], q, k, v)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return True


def needs_no_array(queries: int, keys: int, rules: Visible | None) -> bool:
    """Whether cuDNN has words of its own for these rules."""
    if rules is None or any(x is not None for x in (rules.real, rules.segments, rules.first, rules.slides)):
        return False
    if not rules.causal:
        return rules.window is None
    return queries + rules.prefix == keys and not (rules.window is not None and rules.prefix)


def attend_cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rules: Visible | None,
    mask: Callable[[], jax.Array | None],
    bias: jax.Array | None,
    scale: float | None,
) -> jax.Array:
    """Attention of queries [B, T, N, H] over keys and values [B, S, K, H]; [B, T, N, H] results.

    mask: makes an array of the rules, where one is needed, and where there are no rules.
    """
    settings: dict[str, Any] = {"scale": scale, "implementation": "cudnn"}
    if rules is None or bias is not None or not needs_no_array(q.shape[1], k.shape[1], rules):
        return jax.nn.dot_product_attention(q, k, v, mask=mask(), bias=bias, **settings)
    if not rules.causal:
        return jax.nn.dot_product_attention(q, k, v, **settings)
    # Causal order begins at the first key, where a prefix stands: that many queries in front make both ends meet.
    q = jnp.pad(q, ((0, 0), (rules.prefix, 0), (0, 0), (0, 0)))
    window = None if rules.window is None else (rules.window - 1, 0)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, **settings)
    return out[:, rules.prefix :]
