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
