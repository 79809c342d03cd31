"""Quantised weights are those of bitsandbytes on a CPU, bit for bit."""

from __future__ import annotations

import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
logging.disable(logging.WARNING)  # bitsandbytes tells on import which optional kernels it did not find
functional = pytest.importorskip("bitsandbytes.functional")
logging.disable(logging.NOTSET)

FORMATS = {"nf4": jpeft.NF4, "fp4": jpeft.FP4}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """The order in which torch adds up a mean of more than 32,768 scales depends on the number of its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(out: int, features: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, features)).astype(np.float32)


def same(ours: Any, theirs: Any) -> bool:
    return np.array_equal(np.asarray(ours).reshape(-1), theirs.numpy().reshape(-1))


def check(weight: np.ndarray, dtype: str, kind: str, block_size: int, double_quant: bool) -> None:
    """weight: (out, in), float32; quantised in `dtype` by both."""
    theirs = torch.from_numpy(weight).to(DTYPES[dtype])
    codes, state = functional.quantize_4bit(
        theirs, blocksize=block_size, compress_statistics=double_quant, quant_type=kind
    )
    form = FORMATS[kind](block_size=block_size, double_quant=double_quant)
    q = form.quantize(jnp.asarray(theirs.float().numpy().T).astype(dtype))
    assert same(q.codes, codes)
    scales = state.absmax
    if double_quant:
        assert same(q.arrays["scale_codes"], state.absmax)
        assert same(q.arrays["scale_scales"], state.state2.absmax)
        assert same(q.arrays["scale_offset"], state.offset)
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert same(q.scales, scales)
    # As one row of even length: the kernel for matrices takes wrong scales where rows are not whole blocks.
    state.shape = torch.Size([weight.size + weight.size % 2])
    values = functional.dequantize_4bit(codes, state).reshape(-1)[: weight.size].reshape(weight.shape)
    made = q.dequantize()
    assert made.dtype == dtype
    assert np.array_equal(np.asarray(made.astype(jnp.float32)), values.float().numpy().T)


# 28,800, 16,384, 16,385 and 15 elements: several groups of scales, exactly one, one more block, less than a block.
@pytest.mark.parametrize("shape", [(300, 96), (128, 128), (5, 3277), (3, 5)])
@pytest.mark.parametrize("kind", FORMATS)
def test_sizes(shape: tuple[int, int], kind: str) -> None:
    check(normal(*shape), "float32", kind, 64, double_quant=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dtypes_and_larger_blocks(dtype: str, double_quant: bool) -> None:
    check(normal(300, 96, seed=1), dtype, "nf4", 128, double_quant)


def unusual() -> dict[str, np.ndarray]:
    mixed = normal(33, 70, seed=2)
    mixed[3], mixed[5], mixed[7, :10] = 0, -0.25, 0
    spread = normal(64, 64, seed=3) * np.logspace(-44, 30, 64)[:, None].astype(np.float32)
    return {
        "zeros": np.zeros((64, 64), np.float32),
        "zeros, last block not full": np.zeros((5, 13), np.float32),
        "constant": np.full((33, 70), 0.3, np.float32),
        "zeros and constants among others": mixed,
        "borders": np.resize(np.linspace(-1, 1, 2049, dtype=np.float32), (33, 70)),
        "tiny": normal(33, 70) * np.float32(1e-38),
        "below the normal range": normal(33, 70) * np.float32(1e-41),
        "huge": normal(33, 70) * np.float32(1e35),
        "everything": spread,
    }


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", unusual())
def test_unusual_values(name: str, kind: str) -> None:
    for double_quant in (False, True):
        check(unusual()[name], "float32", kind, 64, double_quant)


def test_the_largest_numbers_have_no_double_quantisation() -> None:
    largest = np.resize(np.float32([3.4e38, -1e38, 2e38]), (33, 70))
    check(largest, "float32", "nf4", 64, double_quant=False)
    with pytest.raises(jpeft.JpeftError, match=r"NF4: the weights are too large, .* double_quant=False"):
        jpeft.NF4().quantize(jnp.asarray(largest))


def test_eight_bit_rows() -> None:
    weight = normal(20, 33)
    weight[4] = 0
    codes, scales, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight).half())
    q = jpeft.Int8().quantize(jnp.asarray(weight.T).astype(jnp.float16))
    assert same(q.codes, codes)
    assert same(q.scales, scales)
    assert same(q.dequantize("float32").T, functional.int8_vectorwise_dequant(codes, scales))
