"""Blocks of numbers: largest magnitudes, nearest codes, two codes to a byte, and a mean that rounds as torch's does.

Every function takes NumPy and JAX arrays alike and computes in the library of its argument. JAX's compiled code treats
numbers below the normal range of float32 as zero and may contract a product and a sum into one rounding; NumPy does
neither, so NumPy is the one to ask where such numbers occur.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from jpeft.quant.codebooks import Codebook

Array = Any  # np.ndarray or jax.Array


def library(array: Array) -> Any:
    """`numpy` or `jax.numpy`, whichever the array belongs to."""
    return np if isinstance(array, np.ndarray | np.generic) else jnp


def split(values: Float[Array, "*lead n"], size: int) -> Float[Array, "*lead blocks size"]:
    """Consecutive blocks of the last axis; the last block is filled up with zeros."""
    missing = -values.shape[-1] % size
    if missing and isinstance(values, np.ndarray):
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    elif missing:
        values = jax.lax.pad(values, np.zeros((), values.dtype), [(0, 0, 0)] * (values.ndim - 1) + [(0, missing, 0)])
    return values.reshape(*values.shape[:-1], -1, size)


def pack(codes: UInt8[Array, "n"], filler: int = 0) -> UInt8[Array, "half"]:
    """Two 4-bit codes to a byte, the first in the high half; `filler` is the second of an odd number's last byte."""
    xp = library(codes)
    if codes.shape[0] % 2:
        codes = xp.concatenate([codes, xp.full((1,), filler, codes.dtype)])
    return (codes[0::2] << 4) | codes[1::2]


def unpack(packed: UInt8[Array, "*lead half"], platform: str = "cpu") -> UInt8[Array, "*lead n"]:
    """The inverse of `pack`; an odd number's filler is still there. platform: for which it is compiled."""
    return _dilated(packed) if platform == "tpu" and not isinstance(packed, np.ndarray) else _side_by_side(packed)


def _side_by_side(packed: UInt8[Array, "*lead half"]) -> UInt8[Array, "*lead n"]:
    return library(packed).stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)


def _dilated(packed: UInt8[Array, "*lead half"]) -> UInt8[Array, "*lead n"]:
    """By putting zeros between the codes of each half: a stack of two is a change of layout, which takes TPUs longer
    than all else in a quantised product, and keeps the compiler from fusing the two (benchmarks/dequantise_tpu.py).
    CPUs are five times slower this way.
    """
    zero, along = jnp.zeros((), packed.dtype), [(0, 0, 0)] * (packed.ndim - 1)
    return jax.lax.pad(packed >> 4, zero, [*along, (0, 1, 1)]) | jax.lax.pad(packed & 15, zero, [*along, (1, 0, 1)])


def nearest(book: Codebook, values: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """The code of each value in [-1, 1]."""
    xp, side = library(values), "right" if book.inclusive else "left"
    if xp is np or len(book.above) > 16:
        place = xp.searchsorted(xp.asarray(book.above), values, side=side).astype(xp.uint8)
    else:  # a sum of comparisons fuses into one pass
        place = sum((values > border).astype(jnp.uint8) for border in book.above)
    if np.array_equal(book.order, np.arange(len(book.order))):
        return place
    return xp.asarray(book.order.astype(np.uint8))[place]


def look_up(values: np.ndarray, codes: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """The value of each code. values: a table of NumPy."""
    if isinstance(codes, np.ndarray):
        return values[codes]
    if len(values) > 16:
        return jnp.asarray(values)[codes.astype(jnp.int32)]
    # A zero that depends on the codes. The compiler sees through it; JAX must not: it would take the constants out of
    # a scan's body, and 0.10.2 then takes them for residuals when a custom_vjp is differentiated twice.
    zero = (codes & 0).astype(jnp.float32)

    def choose(bit: int, values: np.ndarray) -> jax.Array:
        # Selections by bit are elementwise and fuse; a gather from a small table is slow on accelerators.
        if len(values) == 1:
            return zero + values[0]
        lower, upper = np.split(values, 2)
        return jnp.where((codes & bit) != 0, choose(bit // 2, upper), choose(bit // 2, lower))

    return choose(len(values) // 2, values)


def quotient(values: Array, divisor: Array) -> Array:
    """values / divisor, rounded once: the compiler replaces a division by one number with a product."""
    if library(divisor) is np:
        return values / divisor
    return values / jax.lax.optimization_barrier(jnp.broadcast_to(divisor, values.shape))


def mean(values: Float[Array, "n"]) -> Float[Array, ""]:
    """The mean of a vector of float32, added up in the order in which torch adds on a CPU with one thread.

    Eight sums side by side, each over four interleaved rows, each row in a cascade of four levels.
    """
    xp, count = library(values), values.shape[0]
    width = 8 if count >= 8 else 1
    whole = count // width * width
    lanes = _rows(values[:whole].reshape(-1, width))
    total = xp.float32(0)
    for part in (*values[whole:], *lanes):
        total = total + part
    return quotient(total, xp.float32(count))


def _rows(values: Array) -> Array:
    """The sum over the first axis, four rows at a time."""
    whole = values.shape[0] // 4 * 4
    first, *others = _cascade(values[:whole].reshape(-1, 4, *values.shape[1:]))
    return _sum([*values[whole:], *others], first)


def _cascade(values: Array) -> Array:
    """The sum over the first axis: runs of `step` in order, runs of those sums in order, and so on."""
    zero = library(values).zeros(values.shape[1:], values.dtype)
    step = 1 << max(4, math.ceil(math.log2(max(len(values), 1))) // 4)
    left_over = []
    for _ in range(3):
        full = len(values) // step
        left_over.append(_sum(values[full * step :], zero))
        runs = values[: full * step].reshape(full, step, *values.shape[1:])
        values = _sum([runs[:, i] for i in range(1, step)], runs[:, 0])
    return _sum([*left_over[1:], _sum(values, zero)], left_over[0])


def _sum(terms: Any, total: Array) -> Array:
    for term in terms:
        total = total + term
    return total
