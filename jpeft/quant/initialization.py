"""Where a low-rank update starts on a quantised base: from what quantisation loses, or from the principal components.

Each function takes a weight [*lead, in, out] and returns the base to be frozen and the factors a [*lead, in, rank] and
b [*lead, rank, out] in float32, such that `base + a b` is close to the weight. A method that scales its update by s
divides one of the factors by s.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.errors import JpeftError
from jpeft.quant.formats import Format, QuantizedKernel

_HIGHEST = jax.lax.Precision.HIGHEST

Weight = Float[Array, "*lead in out"]
A = Float[Array, "*lead in rank"]
B = Float[Array, "*lead rank out"]


def pissa(weight: Weight, rank: int) -> tuple[Weight, A, B]:
    """(residual, a, b): the `rank` principal components of the weight, and what is left (Meng et al. 2024,
    arXiv:2404.02948). With W = U S V', a = U_r sqrt(S_r) and b = sqrt(S_r) V_r'. The residual is in float32.
    """
    wide = weight.astype(jnp.float32)
    a, b = principal(wide, rank)
    return wide - jnp.matmul(a, b, precision=_HIGHEST), a, b


def qpissa(weight: Weight, form: Format, rank: int, iterations: int = 1) -> tuple[QuantizedKernel, A, B]:
    """(quantised, a, b): PiSSA whose residual is quantised. Further iterations take the components of what the
    quantised residual leaves over, and quantise the rest again.
    """
    wide = weight.astype(jnp.float32)
    residual, a, b = pissa(wide, rank)
    quantized = form.quantize(residual)
    for _ in range(_checked(iterations) - 1):
        a, b = principal(wide - quantized.dequantize(jnp.float32), rank)
        quantized = form.quantize(wide - jnp.matmul(a, b, precision=_HIGHEST))
    return quantized, a, b


def loftq(weight: Weight, form: Format, rank: int, iterations: int = 1) -> tuple[QuantizedKernel, A, B]:
    """(quantised, a, b): LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1). In turn, the weight less the update is
    quantised, and the update becomes the `rank` principal components of what that loses.
    """
    wide = weight.astype(jnp.float32)
    target = wide
    for _ in range(_checked(iterations)):
        quantized = form.quantize(target)
        a, b = principal(wide - quantized.dequantize(jnp.float32), rank)
        target = wide - jnp.matmul(a, b, precision=_HIGHEST)
    return quantized, a, b


def principal(weight: Weight, rank: int) -> tuple[A, B]:
    """The best approximation of that rank (Eckart and Young), the singular values shared between the factors."""
    *lead, features_in, features_out = weight.shape
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(features_in, features_out):
        raise JpeftError(
            f"rank={rank!r}: a weight of [{features_in}, {features_out}] has between 1 and "
            f"{min(features_in, features_out)} components"
        )

    def one(matrix: Array) -> tuple[Array, Array]:
        u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        return u[:, :rank] * root, root[:, None] * v[:rank]

    a, b = jax.lax.map(one, weight.reshape(-1, features_in, features_out))  # temporaries of one layer at a time
    return a.reshape(*lead, features_in, rank), b.reshape(*lead, rank, features_out)


def _checked(iterations: int) -> int:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise JpeftError(f"iterations={iterations!r}: expected a whole number from 1")
    return iterations
