"""How the next token is chosen from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """greedy: the likeliest token. top_k: draw from that many only. nucleus: draw from the mass `top_p` only."""

    greedy: bool
    top_k: int | None = None
    nucleus: bool = False


def next_tokens(
    logits: jax.Array,
    sampling: Sampling,
    temperature: jax.Array,
    top_p: jax.Array,
    key: jax.Array,
    step: jax.Array,
) -> jax.Array:
    """A token [B] for each row of `logits` [B, V]; row b draws with the key folded with b and `step`."""
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    # The largest is moved to 0 first, so that a tiny temperature gives the likeliest token and not infinities.
    allowed = filtered((logits - logits.max(axis=-1, keepdims=True)) / temperature, sampling, top_p)
    rows = jnp.arange(len(logits))
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(rows)
    return jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32)


def filtered(logits: jax.Array, sampling: Sampling, top_p: jax.Array) -> jax.Array:
    """Logits [B, V] with -inf outside the `top_k` likeliest and, of those, outside the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability reaches `top_p`; it is never empty. Tokens
    that tie with the last one allowed are allowed.
    """
    if sampling.top_k is None and not sampling.nucleus:
        return logits
    count = logits.shape[-1] if sampling.top_k is None else min(sampling.top_k, logits.shape[-1])
    likeliest = jax.lax.top_k(logits, count)[0]  # sorted, largest first
    least = likeliest[:, -1]
    if sampling.nucleus:
        probability = jax.nn.softmax(likeliest, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(jnp.where(before < top_p, likeliest, jnp.inf), axis=-1)
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)
