"""Adam whose moments take one byte each (Dettmers et al. 2022, arXiv:2110.02861), as an optax transformation.

    optimizer = jpeft.quant.adam8bit(1e-4)

Both moments of a larger parameter are kept as codes of the dynamic type in blocks of 256 with a scale each: 2.03 bytes
for a parameter instead of 8.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from jpeft.quant import blocks
from jpeft.quant.codebooks import Codebook, moments


class Blockwise(NamedTuple):
    """An array in blocks: [blocks, size] codes and the largest magnitude of each."""

    codes: UInt8[Array, "blocks size"]
    scales: Float[Array, "blocks"]


class ScaleByAdam8bitState(NamedTuple):
    """Steps taken, and the moments: `Blockwise`, or float32 for small parameters."""

    steps: Array
    mu: Any
    nu: Any


def adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    block_size: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformation:
    """AdamW (Adam without weight_decay) with 8-bit moments; see `scale_by_adam8bit`."""
    parts = [scale_by_adam8bit(b1, b2, eps, block_size=block_size, min_size=min_size)]
    parts += [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def scale_by_adam8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, block_size: int = 256, min_size: int = 4096
) -> optax.GradientTransformation:
    """As `optax.scale_by_adam`, with moments in 8 bits between steps; arithmetic is in float32.

    block_size: elements of a flattened parameter that share a scale. min_size: parameters with fewer elements keep
    their moments in float32, as in bitsandbytes. A second moment that is not zero never rounds to zero, so that no
    update is divided by eps alone.
    """
    signed, unsigned = moments(signed=True), moments(signed=False)

    def init(params: Any) -> ScaleByAdam8bitState:
        def empty(param: Array) -> Any:
            zeros = jnp.zeros(param.shape, jnp.float32)
            return _encode(unsigned, zeros, block_size) if param.size >= min_size else zeros

        # A scale of zero makes every code zero, so both moments start alike.
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), jax.tree.map(empty, params), jax.tree.map(empty, params))

    def update(updates: Any, state: ScaleByAdam8bitState, params: Any = None) -> tuple[Any, ScaleByAdam8bitState]:
        del params
        steps = optax.safe_increment(state.steps)
        first, second = 1 - b1 ** steps.astype(jnp.float32), 1 - b2 ** steps.astype(jnp.float32)

        def one(gradient: Array, mu: Any, nu: Any) -> tuple[Array, Any, Any]:
            wide = gradient.astype(jnp.float32)
            mean = b1 * _decode(signed, mu, wide.shape) + (1 - b1) * wide
            square = b2 * _decode(unsigned, nu, wide.shape) + (1 - b2) * wide**2
            direction = (mean / first) / (jnp.sqrt(square / second) + eps)
            if isinstance(mu, Blockwise):
                return direction.astype(gradient.dtype), *(
                    _encode(book, moment, block_size) for book, moment in ((signed, mean), (unsigned, square))
                )
            return direction.astype(gradient.dtype), mean, square

        structure: Any = jax.tree.structure(updates)
        moments_of = [structure.flatten_up_to(tree) for tree in (state.mu, state.nu)]
        made = [one(*parts) for parts in zip(jax.tree.leaves(updates), *moments_of, strict=True)]
        columns = [structure.unflatten(column) for column in zip(*made, strict=True)] if made else [updates] * 3
        return columns[0], ScaleByAdam8bitState(steps, columns[1], columns[2])

    return optax.GradientTransformation(init, update)


def _encode(book: Codebook, values: Array, size: int) -> Blockwise:
    grouped = blocks.split(values.reshape(-1), size)
    scales = jnp.max(jnp.abs(grouped), axis=-1)
    ratios = grouped / jnp.where(scales > 0, scales, 1)[:, None]
    codes = blocks.nearest(book, ratios)
    if book.values[0] == 0:
        codes = jnp.where((grouped > 0) & (codes == 0), 1, codes).astype(jnp.uint8)
    return Blockwise(codes, scales)


def _decode(book: Codebook, moment: Any, shape: tuple[int, ...]) -> Array:
    if not isinstance(moment, Blockwise):
        return moment
    values = blocks.look_up(book.values, moment.codes) * moment.scales[:, None]
    return values.reshape(-1)[: math.prod(shape)].reshape(shape)
