"""Saving as a Hugging Face folder. That transformers reads it to the same logits is in the parity tests."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jpeft.models
from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.models import tensors as files
from jpeft.wrapper import Wrapper
from tests import zoo

LLAMA = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "float16",
    "quantization_config": {"quant_method": "gguf"},
    "something_else": [1],
}
GPT2 = {"model_type": "gpt2", "vocab_size": 31, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
IDS = np.arange(10).reshape(2, 5)


def test_files(tmp_path):
    model = jpeft.models.from_config(LLAMA, task="causal-lm", dtype="bfloat16")
    folder = jpeft.models.save(model, tmp_path / "new" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    raw = json.loads((folder / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert raw["dtype"] == "bfloat16"
    assert raw["something_else"] == [1]
    assert raw["tie_word_embeddings"] is False
    assert not {"torch_dtype", "quantization_config", "id2label"} & set(raw)
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == 3 + 3 * 9
    kernel = stored["model.layers.2.mlp.up_proj.weight"]
    np.testing.assert_array_equal(kernel.T, model.layers.layer.mlp.up_proj.kernel[...][2])


def test_layouts(tmp_path):
    model = jpeft.models.from_config(GPT2, task="sequence-classification", num_labels=3)
    stored = load_file(jpeft.models.save(model, tmp_path) / "model.safetensors")
    np.testing.assert_array_equal(stored["transformer.h.1.mlp.c_fc.weight"], model.h.layer.mlp.c_fc.kernel[...][1])
    np.testing.assert_array_equal(stored["score.weight"].T, model.score.kernel[...])
    np.testing.assert_array_equal(stored["transformer.ln_f.weight"], model.ln_f.scale[...])
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert raw["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize("raw", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("task", ["base", "causal-lm", "sequence-classification"])
def test_round_trip(raw, task, tmp_path):
    model = jpeft.models.from_config(raw, task=task, rngs=nnx.Rngs(3))
    loaded = jpeft.models.load(jpeft.models.save(model, tmp_path))
    assert loaded.task == task
    np.testing.assert_array_equal(loaded(IDS), model(IDS))


def test_wrapped_models_are_refused(tmp_path):
    class Double(Wrapper):
        def __call__(self, x):
            return 2 * self.base(x)

    model = jpeft.models.from_config(LLAMA, task="causal-lm")
    place = ("layers", "layer", "self_attn", "q_proj")
    wrapped = surgery.replace(model, {place: lambda base: Double(base, name="double")})
    assert not np.array_equal(wrapped(IDS), model(IDS))
    for other in (wrapped, Double(model, name="double")):
        with pytest.raises(JpeftError, match=r"jpeft\.merge"):
            jpeft.models.save(other, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(JpeftError, match="Linear"):
        jpeft.models.save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "x")


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    model = jpeft.models.from_config(LLAMA, task="causal-lm")
    jpeft.models.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        yield b"half"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_chunks", full)
    with pytest.raises(JpeftError, match="No space left"):
        jpeft.models.save(jpeft.models.from_config(LLAMA, task="causal-lm", rngs=nnx.Rngs(1)), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JpeftError, match="file"):
        jpeft.models.save(jpeft.models.from_config(LLAMA, task="base"), tmp_path / "file" / "folder")


def test_new_values_are_what_is_saved(tmp_path):
    model = jpeft.models.from_config(LLAMA, task="base")
    model.norm.scale[...] = jnp.full((8,), 2.0)
    assert (
        load_file(jpeft.models.save(model, tmp_path) / "model.safetensors")["model.norm.weight"].tolist() == [2.0] * 8
    )


# LoRA on every family, also where its base is quantised; every other method that merges on one.
TWICE = jpeft.compose(jpeft.LoRA(rank=2), jpeft.LoRA(rank=3, name="second"))
MERGED = {f"lora-{name}": (name, zoo.method("lora", name)) for name in (*zoo.FAMILIES, "llama-nf4")}
for model, method in (*zoo.PAIRS, *zoo.OTHERS):
    if zoo.ENTRIES[method].merges and model in zoo.FAMILIES and method in zoo.METHODS:
        MERGED.setdefault(method, (model, zoo.method(method, model)))
MERGED["twice"] = ("llama", TWICE)


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_on_the_way_to_the_file(name, dtype, tmp_path):
    model_name, method = MERGED[name]
    parts = jpeft.partition(method(zoo.MODELS[model_name].make(dtype), rngs=0))
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    how = zoo.MODELS[model_name].merge
    expected = load_file(jpeft.models.save(jpeft.merge(model, **how), tmp_path / "whole") / "model.safetensors")
    rounding = jpeft.models.save_merged(model, tmp_path / "streamed", **how)
    made = load_file(tmp_path / "streamed" / "model.safetensors")
    assert made.keys() == expected.keys()
    # `merge` rounds between two wrappers, and DoRA's norms.
    close = 2**-7 if dtype == "bfloat16" and name in ("twice", "dora") else 1e-5 if dtype == "float32" else 0
    for key, value in expected.items():
        assert made[key].dtype == value.dtype
        difference = np.abs(made[key].astype(np.float32) - value.astype(np.float32)).max()
        assert difference <= close * np.abs(value.astype(np.float32)).max(), key
    assert (tmp_path / "whole" / "config.json").read_text() == (tmp_path / "streamed" / "config.json").read_text()
    assert (rounding.tensor is None) == (dtype == "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_rounding_changed(dtype, tmp_path):
    base = jpeft.models.from_config(LLAMA, task="causal-lm", dtype=dtype, rngs=nnx.Rngs(0))
    parts = jpeft.partition(jpeft.LoRA(rank=2, targets=["q_proj", "down_proj"], layers=[2])(base, rngs=0))
    values = zoo.trained(parts, size=0.01)
    rounding = jpeft.models.save_merged(jpeft.combine(parts.graphdef, values, *parts[2:]), tmp_path)
    largest, shares = 0.0, {}
    for module, name in (("self_attn/q_proj", "self_attn.q_proj"), ("mlp/down_proj", "mlp.down_proj")):
        a, b = (np.asarray(values[f"layers/{module}/lora/{factor}"][0]) for factor in "ab")
        scale = np.asarray(parts.buffers[f"layers/{module}/lora/scale"][0])
        kernel = np.asarray(parts.frozen[f"layers/{module}/kernel"][2])
        exact = kernel.astype(np.float32) + (a * scale) @ b
        rounded = exact.astype(kernel.dtype).astype(np.float32)
        largest = max(largest, np.abs(rounded - exact).max())
        norms = [np.linalg.norm(part) for part in (rounded - exact, exact - kernel.astype(np.float32))]
        shares[f"model.layers.2.{name}.weight"] = norms[0] / norms[1]
    assert rounding.largest == pytest.approx(largest, rel=1e-3)
    assert rounding.tensor == max(shares, key=shares.get)
    assert rounding.share == pytest.approx(shares[rounding.tensor], rel=1e-2)
    assert rounding.dtype == dtype


def test_layers_without_an_adapter_are_dequantised_too(tmp_path):
    parts = jpeft.partition(
        jpeft.LoRA(rank=2, layers=[1], targets="q_proj")(zoo.MODELS["llama-nf4"].make("float32"), rngs=0)
    )
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    jpeft.models.save_merged(model, tmp_path / "streamed", dequantize=True)
    jpeft.models.save(jpeft.merge(model, dequantize=True), tmp_path / "whole")
    made, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("streamed", "whole"))
    assert made.keys() == expected.keys()
    assert all(np.array_equal(made[name], expected[name]) for name in made if "q_proj" not in name)
    assert all(np.allclose(made[name], expected[name], atol=1e-6) for name in made)
    with pytest.raises(JpeftError, match="its base is quantised"):
        jpeft.models.save_merged(model, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_what_stays_quantised_is_written_as_it_is(tmp_path):
    base = jpeft.NF4(block_size=4, targets=["gate_proj", "up_proj", "down_proj"])(
        jpeft.models.from_config(LLAMA, task="causal-lm")
    )
    parts = jpeft.partition(jpeft.LoRA(rank=2, targets=["q_proj", "v_proj"])(base, rngs=0))
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    jpeft.models.save_merged(model, tmp_path / "streamed")
    jpeft.models.save(jpeft.merge(model), tmp_path / "whole")
    made, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("streamed", "whole"))
    assert made.keys() == expected.keys()
    assert all(np.array_equal(made[name], expected[name]) for name in made if "mlp" in name)
    assert all(np.allclose(made[name], expected[name], atol=1e-6) for name in made)
    assert (tmp_path / "whole" / "config.json").read_text() == (tmp_path / "streamed" / "config.json").read_text()


def test_a_wrapper_above_a_quantised_layer(tmp_path):
    base = jpeft.NF4(block_size=4, targets=["lm_head.dense"])(zoo.MODELS["roberta"].make("float32"))
    model = jpeft.FullTuning(targets="lm_head")(base, rngs=0)
    jpeft.models.save_merged(model, tmp_path / "streamed")
    jpeft.models.save(jpeft.merge(model), tmp_path / "whole")
    made, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("streamed", "whole"))
    assert made.keys() == expected.keys()
    assert all(np.array_equal(made[name], expected[name]) for name in made)


def test_a_merge_that_cannot_be_leaves_no_weights(tmp_path):
    model = jpeft.models.from_config(LLAMA, task="causal-lm", dtype="float16")
    with pytest.raises(JpeftError, match=r"merge: .*is not a function of the weight"):
        jpeft.models.save_merged(jpeft.PrefixTuning(num_virtual_tokens=2)(model, rngs=0), tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()
    parts = jpeft.partition(jpeft.LoRA(rank=2, layers=[1])(model, rngs=0))
    huge = {key: jnp.full_like(value, 1e6) for key, value in parts.adapter.items()}
    large = jpeft.combine(parts.graphdef, huge, parts.buffers, parts.frozen)
    with pytest.raises(JpeftError, match=r"model\.layers\.1\.\S+: the merged weight is not finite in float16"):
        jpeft.models.save_merged(large, tmp_path / "large")
    assert not list((tmp_path / "large").iterdir())
    broken = {key: jnp.full_like(value, jnp.nan) for key, value in parts.adapter.items()}
    with pytest.raises(JpeftError, match=r"save_merged: model\.layers\.1\.\S+: the merged weight is not finite"):
        jpeft.models.save_merged(jpeft.combine(parts.graphdef, broken, *parts[2:]), tmp_path / "broken")
    several = jpeft.multi(jpeft.combine(*parts), [(parts.adapter, parts.buffers)] * 2)
    with pytest.raises(JpeftError, match="merge the tasks one by one"):
        jpeft.models.save_merged(several, tmp_path / "several")
