"""A product of few rows with a 4-bit kernel on a TPU, dequantised tile by tile inside of one Pallas kernel.

Decoding multiplies a handful of rows by every weight: dequantising is then nearly all of the work, and this takes half
of the cycles of XLA's form (benchmarks/dequantise_tpu.py). With many rows the product itself is longer, and a kernel
would dequantise each tile again for every block of them.

The two codes of a byte belong to neighbouring inputs. Instead of bringing weights into that order the kernel multiplies
the even inputs by the codes of the high halves and the odd ones by those of the low halves.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jpeft.quant import blocks
from jpeft.quant.codebooks import four_bit
from jpeft.quant.formats import FP4, NF4, Int4, QuantizedKernel

MOST_ROWS = 256  # up to here one block of rows, and the kernel takes fewer cycles
_ROWS, _LANES = 16, 128  # a tile of bfloat16
OUTPUTS, INPUTS = 512, 1024  # of a weight's tile, at most


def takes(rows: int, dtype: Any, kernel: QuantizedKernel) -> bool:
    """Whether `product` computes this: few rows of bfloat16, 4-bit codes, scales in rows, sizes of whole tiles."""
    inputs, outputs = kernel.shape
    form = kernel.format
    return (
        isinstance(form, NF4 | FP4 | Int4)
        and not getattr(form, "double_quant", False)
        and rows <= MOST_ROWS
        and dtype == jnp.bfloat16
        and kernel.dtype in ("bfloat16", "float32")
        and kernel.codes.ndim == 2
        and outputs % _LANES == 0
        and inputs % (2 * _LANES) == 0
        and math.gcd(inputs, INPUTS) % form.block_size == 0
    )


def product(
    x: Float[Array, "*batch in"], kernel: QuantizedKernel, *, interpret: bool = False
) -> Float[Array, "*batch out"]:
    """x times the dequantised kernel, where `takes` says so; sums are float32. Several at once (`vmap`) are more rows.

    interpret: compute the kernel's steps with XLA, on any device.
    """

    @jax.custom_batching.custom_vmap
    def call(x: Array, kernel: QuantizedKernel) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        return _product(rows, kernel, interpret).reshape(*x.shape[:-1], kernel.shape[1])

    @call.def_vmap
    def _(size: int, batched: Any, x: Array, kernel: QuantizedKernel) -> tuple[Array, bool]:
        mapped = [bool(flag) for flag in jax.tree.leaves(batched[1])]
        if not any(mapped):
            return product(x, kernel, interpret=interpret), True
        whole = jax.tree.map(
            lambda array, flag: array if flag else jnp.broadcast_to(array, (size, *array.shape)), kernel, batched[1]
        )
        given = x if batched[0] else jnp.broadcast_to(x, (size, *x.shape))
        pairs = (given, whole)
        return jax.lax.map(lambda pair: product(*pair, interpret=interpret), pairs), True

    return call(x, kernel)


@functools.partial(jax.jit, static_argnums=2)
def _product(x: Float[Array, "rows in"], kernel: QuantizedKernel, interpret: bool) -> Float[Array, "rows out"]:
    (inputs, outputs), block = kernel.shape, getattr(kernel.format, "block_size", 0)
    wide, deep = math.gcd(outputs, OUTPUTS), math.gcd(inputs, INPUTS)
    filled = jnp.pad(x, ((0, -x.shape[0] % _ROWS), (0, 0)))
    rows, steps, groups = filled.shape[0], inputs // deep, deep // block

    def by_step(scales: Array) -> Array:  # [steps, out, groups]: no tile may be narrower than its array
        return scales.astype(jnp.float32).reshape(outputs, steps, groups).swapaxes(0, 1)

    scales = [by_step(kernel.arrays[name]) for name in ("scales", "minima") if name in kernel.arrays]
    # Each scale for half of its block: half of the inputs are in each of the products.
    spread = jnp.asarray(np.kron(np.eye(groups), np.ones((1, block // 2))), jnp.float32)

    half = pl.BlockSpec((rows, deep // 2), lambda out, step: (0, step))
    return pl.pallas_call(
        functools.partial(_tile, kernel.format),
        grid=(outputs // wide, steps),
        in_specs=[
            half,
            half,
            pl.BlockSpec((wide, deep // 2), lambda out, step: (out, step)),
            pl.BlockSpec(spread.shape, lambda out, step: (0, 0)),
            *[pl.BlockSpec((None, wide, groups), lambda out, step: (step, out, 0)) for _ in scales],
        ],
        out_specs=pl.BlockSpec((rows, wide), lambda out, step: (0, out)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
        interpret=interpret,
    )(filled[:, 0::2], filled[:, 1::2], kernel.codes, spread, *scales)[: x.shape[0]].astype(x.dtype)


def _tile(form: Any, even: Any, odd: Any, codes: Any, spread: Any, *refs: Any) -> None:
    """Adds the products of one tile of weights [wide, deep] to the sums of its outputs."""
    *factors, out = refs

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        out[...] = jnp.zeros_like(out)

    # A product with ones: nothing else copies along lanes as quickly, and in full precision it is exact.
    scales = [jnp.dot(ref[...], spread[...], precision=jax.lax.Precision.HIGHEST) for ref in factors]
    packed = codes[...].astype(jnp.int32)
    total = out[...]
    for inputs, half in ((even, packed >> 4), (odd, packed & 15)):
        weights = _values(form, half) * scales[0]
        weights = (weights + scales[1] if len(scales) > 1 else weights).astype(inputs.dtype)
        along = (((1,), (1,)), ((), ()))
        total += jax.lax.dot_general(inputs[...], weights, along, preferred_element_type=jnp.float32)
    out[...] = total


def _values(form: Any, codes: Array) -> Array:
    if isinstance(form, Int4):
        return codes.astype(jnp.float32) - (8 if form.symmetric else 0)
    return blocks.look_up(four_bit(form.kind).values, codes)
