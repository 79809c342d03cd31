"""Models that are quantised while they load, or stored quantised."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft import models
from jpeft.models.packed import _AWQ_ORDER
from jpeft.models.tensors import SafetensorsFile
from jpeft.quant import QuantizedLinear

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
IDS = np.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.from_config(CONFIG, rngs=nnx.Rngs(0)), tmp_path_factory.mktemp("plain"))


def frozen(model: Any) -> dict[str, jax.Array]:
    return jpeft.partition(model).frozen


def same(one: Any, other: Any) -> bool:
    a, b = frozen(one), frozen(other)
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and jnp.array_equal(a[key], b[key]) for key in a)


def test_quantised_while_loading_equals_quantised_afterwards(plain: Path) -> None:
    base = models.load(plain, dtype="bfloat16")
    for form in (jpeft.NF4(), jpeft.Int8(exclude=["mlp"], compute_dtype="float32")):
        made, expected = models.load(plain, dtype="bfloat16", quantize=form), form(base)
        assert same(made, expected)
        assert jpeft.partition(made).graphdef == jpeft.partition(expected).graphdef
    assert same(models.load(plain, quantize="fp4"), jpeft.FP4()(models.load(plain)))
    with pytest.raises(jpeft.JpeftError, match="'nf3' is no format"):
        models.load(plain, quantize="nf3")
    with pytest.raises(jpeft.JpeftError, match="no matrix there is stored in a format that can be kept"):
        models.load(plain, quantize="keep")
    with pytest.raises(jpeft.JpeftError, match="target 'wq' matches nothing"):
        models.load(plain, quantize=jpeft.NF4(targets=["wq"]))


def test_the_full_model_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**CONFIG, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_key_value_heads": 4}
    folder = models.save(models.from_config(config, rngs=nnx.Rngs(0)), tmp_path)
    whole = (folder / "model.safetensors").stat().st_size
    before = sum(array.nbytes for array in jax.live_arrays())
    held, read = [], SafetensorsFile.read

    def watched(self: SafetensorsFile, name: str) -> np.ndarray:
        arrays = sum(array.nbytes for array in jax.live_arrays()) - before
        held.append(arrays + tracemalloc.get_traced_memory()[0])  # JAX's arrays and NumPy's
        return read(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", watched)
    models.load(folder, quantize=jpeft.NF4())  # compiles
    held.clear()
    tracemalloc.start()
    try:
        model = models.load(folder, quantize=jpeft.NF4())
    finally:
        tracemalloc.stop()
    packed = sum(array.nbytes for array in frozen(model).values())
    largest = 128 * 256 * 4
    assert packed < whole / 5
    assert max(held) < packed + 4 * largest < whole / 3


def test_saved_as_bitsandbytes_has_it_and_read_back(plain: Path, tmp_path: Path) -> None:
    forms = {"nf4": jpeft.NF4(), "fp4": jpeft.FP4(block_size=32, double_quant=False), "int8": jpeft.Int8()}
    for name, form in forms.items():
        made = models.load(plain, quantize=form)
        again = models.load(models.save(made, tmp_path / name))
        assert same(again, made)
        assert jpeft.partition(again).graphdef == jpeft.partition(made).graphdef
        assert jnp.array_equal(again(IDS), made(IDS))
    with pytest.raises(jpeft.JpeftError, match="is quantised already, as NF4"):
        models.load(tmp_path / "nf4", quantize="int8")
    with pytest.raises(jpeft.JpeftError, match=r"save: 'model.layers.0.mlp.\w+.weight' is quantised as Int4"):
        models.save(models.load(plain, quantize="int4"), tmp_path / "int4")
    mixed = jpeft.Int8(targets=["self_attn.o_proj"])(models.load(plain, quantize=jpeft.NF4(exclude=["o_proj"])))
    with pytest.raises(jpeft.JpeftError, match="one quantised format only"):
        models.save(mixed, tmp_path / "mixed")


def damaged(folder: Path, to: Path, change: Any) -> Path:
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


STEM = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{STEM}.absmax"), "lacks"),
        (lambda t: t.update({f"{STEM}.absmax": t[f"{STEM}.absmax"][1:]}), r"absmax' uint8\[95\], expected \[96\]"),
        (lambda t: t.update({f"{STEM}.quant_map": t[f"{STEM}.quant_map"] * 2}), "code book of its own"),
        (lambda t: t.update({STEM: t[STEM][:-1]}), "does not hold the 6144 codes"),
        (
            lambda t: t.update({f"{STEM}.quant_state.bitsandbytes__nf4": np.frombuffer(b'{"shape": [2]}', np.uint8)}),
            r"has shape \[2\]",
        ),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith(STEM)], r"missing \(1\): model.layers.1.mlp.up_proj"),
    ],
)
def test_damaged_files_are_refused(plain: Path, tmp_path: Path, change: Any, said: str) -> None:
    folder = models.save(models.load(plain, quantize="nf4"), tmp_path / "whole")
    with pytest.raises(jpeft.JpeftError, match=said):
        models.load(damaged(folder, tmp_path / "damaged", change))


def words(codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Eight codes of the last axis to a word: from the lowest bits up, the columns in `order`."""
    made = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for place, column in enumerate(order):
        made |= codes[..., column::8].astype(np.uint32) << np.uint32(4 * place)
    return made.view(np.int32)


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "awq"])
def test_groups_of_gptq_and_awq(plain: Path, tmp_path: Path, method: str) -> None:
    """Every projection as codes, zero points and scales of groups of 32 inputs, packed as the formats are described."""
    rng, tensors, expected = np.random.default_rng(0), load_file(plain / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        layer, (outputs, inputs) = name.removesuffix(".weight"), tensors.pop(name).shape
        codes = rng.integers(0, 16, (inputs, outputs))
        zeros = rng.integers(1, 16, (inputs // 32, outputs))
        scales = rng.uniform(0.001, 0.01, zeros.shape).astype(np.float16)
        expected[name] = (scales.astype(np.float32).repeat(32, 0) * (codes - zeros.repeat(32, 0))).T
        if method == "awq":
            parts = {"qweight": words(codes, _AWQ_ORDER), "qzeros": words(zeros, _AWQ_ORDER)}
        else:
            stored = zeros - (method == "gptq")
            parts = {"qweight": words(codes.T, np.arange(8)).T.copy(), "qzeros": words(stored, np.arange(8))}
            parts["g_idx"] = np.arange(inputs, dtype=np.int32) // 32
        tensors |= {f"{layer}.{part}": array for part, array in {**parts, "scales": scales}.items()}
    kind, _, version = method.partition("_")
    config = {"quant_method": kind, "bits": 4, "group_size": 32, "checkpoint_format": f"gptq_{version}"}
    raw = json.loads((plain / "config.json").read_text())
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    save_file(tensors, folder / "model.safetensors")
    model = models.load(folder, dtype="float32")
    up = model.layers.layer.mlp.up_proj
    assert isinstance(up, QuantizedLinear)
    assert up.format == jpeft.Int4(block_size=32, symmetric=False)
    for name, node in {"mlp.up_proj": up, "self_attn.k_proj": model.layers.layer.self_attn.k_proj}.items():
        whole = np.stack([expected[f"model.layers.{layer}.{name}.weight"].T for layer in (0, 1)])
        assert np.allclose(node.quantized.dequantize(), whole, rtol=1e-6, atol=1e-9)
    if method == "gptq":
        tensors["model.layers.0.mlp.up_proj.g_idx"] = tensors["model.layers.0.mlp.up_proj.g_idx"][::-1].copy()
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(jpeft.JpeftError, match="desc_act"):
            models.load(folder)
    for odd, said in (({"bits": 8}, "8 bits"), ({"quant_method": "hqq"}, "quantised by 'hqq'")):
        (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": {**config, **odd}}))
        with pytest.raises(jpeft.JpeftError, match=said):
            models.load(folder)
