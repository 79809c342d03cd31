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


# LoRA on every family, also where its base is quantised, and the other methods on one.
MERGED = [
    (model, name) for model, name in zoo.PAIRS if zoo.ENTRIES[name].merges and model in {*zoo.FAMILIES, "llama-nf4"}
]
MERGED = [pair for i, pair in enumerate(MERGED) if pair[1] == "lora" or pair[1] not in {name for _, name in MERGED[:i]}]


@pytest.mark.parametrize(("model_name", "method_name"), MERGED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_on_the_way_to_the_file(model_name, method_name, dtype, tmp_path):
    parts = jpeft.partition(zoo.method(method_name, model_name)(zoo.MODELS[model_name].make(dtype), rngs=0))
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    how = zoo.MODELS[model_name].merge
    expected = load_file(jpeft.models.save(jpeft.merge(model, **how), tmp_path / "whole") / "model.safetensors")
    rounding = jpeft.models.save_merged(model, tmp_path / "streamed", **how)
    made = load_file(tmp_path / "streamed" / "model.safetensors")
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        assert made[name].dtype == value.dtype
        # A base whose weights are dequantised in bfloat16 is rounded once here, and there before and after.
        np.testing.assert_allclose(
            made[name].astype(np.float32),
            value.astype(np.float32),
            rtol=1e-5 if dtype == "float32" else 2**-7,
            atol=1e-6,
        )
    assert (tmp_path / "whole" / "config.json").read_text() == (tmp_path / "streamed" / "config.json").read_text()
    assert (rounding.tensor is None) == (dtype == "float32")
    if rounding.tensor is not None:
        largest = np.abs(made[rounding.tensor].astype(np.float32)).max()
        assert 0 < rounding.largest <= 2**-8 * largest * 1.01
        assert rounding.relative == pytest.approx(rounding.largest / largest, rel=0.01)


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
