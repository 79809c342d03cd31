"""How the factors of a low-rank update start.

| init | a | b | the update starts as |
|---|---|---|---|
| "kaiming" | uniform within 1 / sqrt(fan_in), as in LoRA's code | 0 | 0 |
| "gaussian" | normal, standard deviation 1 / r | 0 | 0 |
| "orthogonal" | normal times alternate rows of a rotation | normal times the other rows | 0 |
| "pissa" | the r principal components of the weight, shared between a and b | | what they sum to |
| "olora" | the first r rows of R, of the weight's QR | the first r columns of Q | their product |
| "loftq" | what quantisation takes from the weight, shared between a and b (`jpeft.loftq`) | | what they sum to |
| "eva" | the principal components of the layer's inputs (`jpeft.eva`) | 0 | 0 |

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start from a part of the weight, which their papers take out of
the weight. Here the weight stays as it is, for other adapters and for merging, and the part is taken off in the update:
`x a b - x a0 b0`, with the starting values a0 and b0 kept beside a and b. That is one product of rank 2r.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.quant.initialization import principal

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
FROM_THE_WEIGHT = ("pissa", "olora")
# What needs more than the model that the method is called on, and how to give it.
FROM_ELSEWHERE = {
    "loftq": "the weights before quantisation: jpeft.loftq(model, method, jpeft.NF4(), rngs=0)",
    "eva": "batches of data: jpeft.eva(model, method, batches, rngs=0)",
}


def from_noise(
    key: jax.Array, shape_a: tuple[int, ...], shape_b: tuple[int, ...], init: str
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Initial a [..., r] and b [r, ...] of one layer, in float32, whose product is zero."""
    if init == "gaussian":
        return jax.random.normal(key, shape_a) / shape_a[-1], jnp.zeros(shape_b)
    if init == "orthogonal":
        turn, left, right = jax.random.split(key, 3)
        rank = shape_a[-1]
        q, _ = jnp.linalg.qr(jax.random.normal(turn, (rank, rank)))
        half = rank // 2
        a = jax.random.normal(left, (*shape_a[:-1], half)) @ q[0::2] / 10
        b = jnp.tensordot(q[1::2].T, jax.random.normal(right, (half, *shape_b[1:])), axes=1) / 10
        return a, b
    bound = 1 / math.sqrt(math.prod(shape_a[:-1]))
    return jax.random.uniform(key, shape_a, minval=-bound, maxval=bound), jnp.zeros(shape_b)


def from_weight(weight: Float[Array, "*lead in out"], scale: Float[Array, "*lead r"], init: str) -> tuple[Array, Array]:
    """a [*lead, in, r] and b [*lead, r, out] that start from the weight, in float32; 0 where `scale` is."""
    *lead, features_in, features_out = weight.shape
    rank = scale.shape[-1]
    if init == "pissa":
        a, b = principal(weight, rank)
        # scale * (a b) shall be the components.
        root = jnp.where(scale > 0, jax.lax.rsqrt(jnp.maximum(scale, 1e-30)), 0)
        return a * root[..., None, :], b * root[..., :, None]

    def one(matrix: Array) -> tuple[Array, Array]:
        q, r = jnp.linalg.qr(matrix.T)
        return r[:rank].T, q[:, :rank].T

    a, b = jax.lax.map(one, weight.reshape(-1, features_in, features_out))
    live = (scale != 0).astype(a.dtype)
    return (
        a.reshape(*lead, features_in, rank) * live[..., None, :],
        b.reshape(*lead, rank, features_out) * live[..., :, None],
    )
