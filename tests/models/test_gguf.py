"""GGUF files: what is read from them, and that files which lie are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, quantize

import jpeft
from jpeft import JpeftError, models
from jpeft.models.gguf import GGUFSource
from jpeft.models.gguf_file import GGUFFile
from jpeft.models.saving import save

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
OWN = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
IDS = np.arange(14, dtype=np.int32).reshape(2, 7) * 5 % 96


def checkpoint(folder: Path, config: dict) -> dict[str, np.ndarray]:
    """A random model's tensors under Hugging Face's names."""
    from safetensors.numpy import load_file

    save(models.from_config(config, rngs=nnx.Rngs(3)), folder)
    return load_file(folder / "model.safetensors")


def own_name(name: str) -> str:
    *front, module, kind = name.removeprefix("model.").split(".")
    layer = f"blk.{front[1]}." if front else ""
    return f"{layer}{OWN[module]}.{kind}"


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    config: dict = CONFIG,
    *,
    architecture: str = "llama",
    kind: Kind = Kind.F32,
    extra: dict | None = None,
    more: dict[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF file of the tensors; matrices are stored as `kind`."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_eos_token_id(2)
    for key, value in (extra or {}).items():
        {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)](key, value)
    for name, tensor in tensors.items():
        stored = tensor
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            stored = interleaved(tensor, config["num_attention_heads" if ".q_" in name else "num_key_value_heads"])
        used = kind if tensor.ndim == 2 else Kind.F32
        writer.add_tensor(own_name(name), quantize(stored, used), raw_dtype=used)
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return checkpoint(tmp_path_factory.mktemp("hf"), CONFIG)


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors)


def test_a_file_gives_the_tensors_and_logits_it_was_written_from(path, tensors):
    source = GGUFSource(path)
    assert source.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor, err_msg=name)
    expected = models.from_config(CONFIG, rngs=nnx.Rngs(3))(IDS)
    np.testing.assert_allclose(models.load(path)(IDS), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_stored_types(kind, tensors, tmp_path):
    path = write(tmp_path / "typed.gguf", tensors, kind=kind)
    source = GGUFSource(path)
    loose = {Kind.F16: 1e-3, Kind.BF16: 1e-2, Kind.Q8_0: 1e-2, Kind.Q5_0: 0.07, Kind.Q5_1: 0.07}.get(kind, 0.13)
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.dtype == source.tensors[name].dtype, name
        assert read.shape == tensor.shape
        np.testing.assert_allclose(read.astype(np.float32), tensor, atol=loose * np.abs(tensor).max(), err_msg=name)
    stored = {Kind.F16: jnp.float16, Kind.BF16: jnp.bfloat16}.get(kind, jnp.float32)
    assert models.load(path).embed_tokens.embedding.dtype == stored
    assert models.load(path, dtype="bfloat16").embed_tokens.embedding.dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_blocks_are_kept_when_asked(kind, tensors, tmp_path):
    path = write(tmp_path / "kept.gguf", tensors, kind=kind)
    kept, dense = models.load(path, quantize="keep"), models.load(path)
    for part in ("self_attn", "mlp"):
        for name, linear in vars(getattr(dense.layers.layer, part)).items():
            if name.endswith("_proj"):
                packed = getattr(getattr(kept.layers.layer, part), name)
                np.testing.assert_array_equal(packed.quantized.dequantize(), linear.kernel[...], err_msg=name)
                bits = 8 * packed.quantized.nbytes / linear.kernel.size
                assert bits == {Kind.Q8_0: 8.5, Kind.Q4_0: 4.5, Kind.Q4_1: 5.0}[kind]
    np.testing.assert_allclose(kept(IDS), dense(IDS), rtol=1e-4, atol=1e-5)
    # Quantised a second time, from the dequantised values.
    again = models.load(path, quantize="nf4").layers.layer.mlp.up_proj
    assert np.array_equal(again.codes[...], jpeft.NF4().quantize(dense.layers.layer.mlp.up_proj.kernel[...]).codes)


def test_layers_that_differ_in_format_are_refused(tensors, tmp_path):
    one = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    (name,) = tensors.keys() - one.keys()
    path = write(tmp_path / "mixed.gguf", one, kind=Kind.Q8_0, more={own_name(name): tensors[name]})
    assert models.load(path).layers.layer.mlp.up_proj.kernel.shape == (3, 64, 96)
    with pytest.raises(JpeftError, match="the layers of 'layers/mlp/up_proj/kernel' differ in format"):
        models.load(path, quantize="keep")


@pytest.mark.parametrize(("architecture", "biased", "normed"), [("qwen2", True, False), ("qwen3", False, True)])
def test_qwen_rows_are_not_permuted(architecture, biased, normed, tmp_path):
    config = {**CONFIG, "model_type": architecture, "architectures": [f"{architecture.title()}ForCausalLM"]}
    if architecture == "qwen2":
        config["head_dim"] = 16  # qwen2 has no width of its own
    tensors = checkpoint(tmp_path / "hf", config)
    assert any("q_proj.bias" in name for name in tensors) == biased
    assert any("q_norm" in name for name in tensors) == normed
    loaded = models.load(write(tmp_path / "q.gguf", tensors, config, architecture=architecture))
    assert loaded.config.model_type == architecture
    np.testing.assert_allclose(loaded(IDS), models.from_config(config, rngs=nnx.Rngs(3))(IDS), rtol=1e-5, atol=1e-6)


def test_biases_are_permuted_with_their_rows(tmp_path):
    config = {**CONFIG, "attention_bias": True, "tie_word_embeddings": True}
    tensors = checkpoint(tmp_path / "hf", config)
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=t.shape).astype(t.dtype) if n.endswith("bias") else t for n, t in tensors.items()}
    source = GGUFSource(write(tmp_path / "b.gguf", tensors, config))
    assert source.config["attention_bias"]
    assert source.config["tie_word_embeddings"]
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name), tensor, err_msg=name)


def llama3_factors(factor: float) -> np.ndarray:
    """As the converter of llama.cpp writes them."""
    made = []
    for i in range(0, 32, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / 32)
        smooth = (8192 / wavelength - 1) / 3
        made.append(1 if smooth >= 1 else factor if smooth <= 0 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(made, np.float32)


def test_llama3_rope_scaling(tensors, tmp_path):
    config = {**CONFIG, "rope_theta": 500000.0}
    path = write(tmp_path / "l3.gguf", tensors, config, more={"rope_freqs.weight": llama3_factors(32.0)})
    scaling = GGUFSource(path).config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    models.load(path)
    odd = write(tmp_path / "odd.gguf", tensors, config, more={"rope_freqs.weight": np.arange(1, 17, dtype=np.float32)})
    with pytest.raises(JpeftError, match=r"rope_freqs\.weight scales the rotary embedding"):
        models.load(odd)
    none = write(tmp_path / "none.gguf", tensors, config, more={"rope_freqs.weight": np.ones(16, np.float32)})
    assert "rope_scaling" not in GGUFSource(none).config


def test_metadata_reaches_the_configuration(tensors, tmp_path):
    extra = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.padding_token_id": 5,
    }
    model = models.load(write(tmp_path / "m.gguf", tensors, extra=extra))
    assert model.config.eos_token_id == (2, 7)
    assert model.config.pad_token_id == 5
    assert GGUFSource(tmp_path / "m.gguf").config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    window = write(tmp_path / "w.gguf", tensors, extra={"llama.attention.sliding_window": 5})
    assert models.load(window).config.model_type == "mistral"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma2"}, "the architecture 'gemma2' is not read"),
        ({"extra": {"llama.expert_count": 8}}, r"llama\.expert_count = 8"),
        ({"extra": {"llama.logit_scale": 2.0}}, r"llama\.logit_scale = 2\.0"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, r"rope\.scaling\.type = 'yarn'"),
        (
            {"extra": {"llama.rope.dimension_count": 16}},
            r"rope\.dimension_count = 16: expected the width of a head, 32",
        ),
        ({"more": {"blk.0.ffn_gate_exps.weight": np.ones((2, 2), np.float32)}}, r"blk\.0\.ffn_gate_exps\.weight"),
    ],
)
def test_what_is_not_known_is_refused(changes, message, tensors, tmp_path):
    with pytest.raises(JpeftError, match=message):
        models.load(write(tmp_path / "x.gguf", tensors, **changes))


def test_missing_and_wrongly_shaped_tensors_are_named(tensors, tmp_path):
    changed = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    changed["model.norm.weight"] = np.ones(32, np.float32)
    with pytest.raises(JpeftError, match=r"(?s)layers\.1\.mlp\.up_proj\.weight.*model\.norm\.weight float32\[32\]"):
        models.load(write(tmp_path / "m.gguf", changed))


def test_truncated_at_any_place(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 7, 8, 20, 24, 40, 100, 333, 600, 1200, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(JpeftError, match=r"cut\.gguf"):
            models.load(cut)


def header(tensors: int, entries: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def described(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


PAD = b"\0" * 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\3\4" + PAD, "not a GGUF file"),
        (header(0, 0, version=99), "version 99"),
        (header(0, 0, version=3 << 24), "big-endian"),
        (header(2**60, 0), "claims 1152921504606846976 tensors"),
        (header(0, 2**60, PAD), "metadata entries"),
        (header(0, 1, struct.pack("<Q", 2**63) + PAD), "a metadata key"),
        (header(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 2**50) + PAD), "claims 1125899906842624 strings"),
        (header(0, 1, text("a") + struct.pack("<IIQ", 9, 0, 2**62) + PAD), "would take"),
        (header(0, 1, text("a") + struct.pack("<IIQ", 9, 9, 1) + PAD), "array of arrays"),
        (header(0, 1, text("a") + struct.pack("<I", 77) + PAD), "unknown value type 77"),
        (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + PAD), "not UTF-8"),
        (header(0, 2, (text("a") + struct.pack("<IB", 7, 1)) * 2 + PAD), "'a' stands twice"),
        (header(0, 1, text("general.alignment") + struct.pack("<II", 4, 3) + PAD), "power of two"),
        (header(1, 0, text("t") + struct.pack("<I", 2**31) + PAD), "claims 2147483648 dimensions"),
        (header(1, 0, described("t", (2**40, 2**40), 0, 0) + PAD), "truncated"),
        (header(1, 0, described("t", (4,), 0, 2**63) + PAD), "truncated"),
        (header(1, 0, described("t", (4,), 999, 0) + PAD), "unknown type 999"),
        (header(1, 0, described("t", (4,), 8, 0) + PAD), "cannot consist of Q8_0"),
        (header(1, 0, described("t", (0,), 0, 0) + PAD), "cannot consist"),
        (header(2, 0, described("t", (4,), 0, 0) * 2 + PAD), "'t' stands twice"),
    ],
)
def test_headers_that_lie(data, message, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(JpeftError, match=message):
        GGUFFile(path)


def test_a_type_without_dequantiser_is_named(tmp_path):
    path = tmp_path / "i.gguf"
    path.write_bytes(header(1, 0, described("t", (4,), Kind.I8.value, 0) + PAD))
    with pytest.raises(JpeftError, match="stored as I8"):
        GGUFFile(path).read("t")


def test_no_such_file(tmp_path):
    with pytest.raises(JpeftError, match="no such file"):
        models.load(tmp_path / "absent.gguf")
    with pytest.raises(JpeftError, match="cannot be read"):
        GGUFFile(tmp_path / "absent.gguf")
