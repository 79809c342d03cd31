"""The code books of bitsandbytes: NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314) and the 8-bit dynamic types.

A code book is a table of values; a number between -1 and 1 gets the code of the nearest value. Which of two values is
nearest is decided by thresholds, so that a number on the border gets the code that bitsandbytes gives it on a CPU.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Sign, then two bits of exponent and one of mantissa, in bitsandbytes' order of the magnitudes.
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """values: float32, by code. order: the codes by rising value. above: float32, by place in `order`; a number that
    exceeds (or, with `inclusive`, reaches) `above[i]` belongs to a value behind place i.
    """

    values: np.ndarray
    order: np.ndarray
    above: np.ndarray
    inclusive: bool = False


@functools.cache
def four_bit(name: str) -> Codebook:
    """The 16 values of "nf4" or "fp4"."""
    if name == "nf4":
        values, order = np.array(_NF4, np.float32), np.arange(16)
    else:
        # Zero has two codes, 0 and 8; small numbers above zero get the second.
        values = np.array([*_FP4_MAGNITUDES, *(0 - value for value in _FP4_MAGNITUDES)], np.float32)
        order = np.argsort(values, kind="stable")
    ranked = values[order]
    return Codebook(values, order, (ranked[:-1] + ranked[1:]) / np.float32(2))


@functools.cache
def dynamic() -> Codebook:
    """The signed dynamic type with bitsandbytes' borders on a CPU, as it quantises scales."""
    values = _dynamic_values(signed=True)
    return Codebook(values, np.arange(256), _first_of_each(values), inclusive=True)


@functools.cache
def moments(*, signed: bool) -> Codebook:
    """The dynamic type, signed or not, with the borders half-way between its values, as optimizers use it."""
    values = _dynamic_values(signed=signed)
    return Codebook(values, np.arange(256), (values[:-1] + values[1:]) / np.float32(2))


def _dynamic_values(*, signed: bool) -> np.ndarray:
    """256 values in 7 decades, finer towards the top (Dettmers 2015, arXiv:1511.04561)."""
    made = [0.0, 1.0]
    for exponent in range(7):
        edges = _evenly(0.1, 1, 2 ** (exponent if signed else exponent + 1) + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (exponent - 6)) * means
        made += [*magnitudes, *(-magnitudes if signed else ())]
    return np.sort(np.array(made, np.float32))


def _evenly(first: float, last: float, count: int) -> np.ndarray:
    """Evenly spaced float32 numbers as torch.linspace rounds them: once, and from either end to the middle."""
    start, stop = np.float32(first), np.float32(last)
    step = np.float64((stop - start) / np.float32(count - 1))
    index = np.arange(count)
    made = np.where(index < count // 2, start + step * index, stop - step * (count - 1 - index))
    return made.astype(np.float32)


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """The smallest number in [-1, 1] that gets each code but the first.

    bitsandbytes rounds a number to one of 65,536 even steps and looks the step up in a table, so neighbouring small
    values share a code. The search runs over the bits of float32, which order numbers of one sign.
    """
    steps = (np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)).astype(np.float32)
    middles = np.float32(0.5) * (values[:-1] + values[1:])
    table = np.searchsorted(middles, steps, side="left")

    def code(numbers: np.ndarray) -> np.ndarray:
        halves = ((numbers + np.float32(1)) * np.float32(0.5)).astype(np.float64)
        return table[(halves * 65535 + 0.5).astype(np.float32).astype(np.int64)]

    def number(rank: np.ndarray) -> np.ndarray:
        return np.where(rank < 0, -(-rank).astype(np.int32).view(np.float32), rank.astype(np.int32).view(np.float32))

    most = int(np.float32(1).view(np.int32))
    wanted = np.arange(1, len(values))
    low, high = np.full(len(wanted), -most - 1, np.int64), np.full(len(wanted), most, np.int64)
    while np.any(high - low > 1):  # code(low) < wanted <= code(high)
        middle = (low + high) // 2
        reached = code(number(middle)) >= wanted
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    # A code that no number gets has the threshold of the next one.
    return number(high)
