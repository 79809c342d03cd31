"""Loading from folders: what fits is streamed into place, what does not is reported at once, what lies is refused."""

import json
import pickle
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jpeft.models
from jpeft.errors import JpeftError
from jpeft.models.loading import open_source
from jpeft.variables import Trainable

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
IDS = np.arange(10).reshape(2, 5)


@pytest.fixture
def model():
    return jpeft.models.from_config(LLAMA, rngs=nnx.Rngs(7))


@pytest.fixture
def folder(model, tmp_path):
    return jpeft.models.save(model, tmp_path / "checkpoint")


def tensors(folder):
    return {name: np.array(value) for name, value in load_file(folder / WEIGHTS).items()}


def config(folder, **changes):
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def equal(a, b):
    for (path, x), (_, y) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (a, b)), strict=True):
        np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))


def test_loads_what_was_saved(model, folder):
    loaded = jpeft.models.load(str(folder))
    equal(loaded, model)
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(loaded(IDS), model(IDS))


def test_sharded(model, folder):
    everything = tensors(folder)
    (folder / WEIGHTS).unlink()
    table, names = {}, sorted(everything)
    for part in range(3):
        shard = f"model-{part + 1:05d}-of-00003.safetensors"
        save_file({name: everything[name] for name in names[part::3]}, folder / shard)
        table |= dict.fromkeys(names[part::3], shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    equal(jpeft.models.load(folder), model)


def test_the_base_prefix_is_optional(model, folder):
    save_file({name.removeprefix("model."): value for name, value in tensors(folder).items()}, folder / WEIGHTS)
    equal(jpeft.models.load(folder), model)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", jnp.float16])
def test_dtypes(folder, stored, wanted):
    save_file({name: value.astype(np.float32) for name, value in tensors(folder).items()}, folder / WEIGHTS)
    kind = ml_dtypes.bfloat16 if stored == "bfloat16" else np.dtype(stored)
    jpeft.models.save(jpeft.models.load(folder, dtype=stored), folder)
    loaded = jpeft.models.load(folder, dtype=wanted)
    expected = jnp.dtype(kind if wanted is None else wanted)
    assert {v.dtype for v in jax.tree.leaves(nnx.state(loaded))} == {expected}
    assert loaded(IDS).dtype == expected


def test_dtype_is_checked(folder):
    for dtype in ("int8", "float", object(), "float64"):
        with pytest.raises(JpeftError, match="float32"):
            jpeft.models.load(folder, dtype=dtype)


def test_harmless_buffers_are_left_unread(model, folder):
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    save_file(tensors(folder) | more, folder / WEIGHTS)
    equal(jpeft.models.load(folder), model)


def test_everything_wrong_is_reported_at_once(folder):
    found = tensors(folder)
    del found["model.layers.1.mlp.up_proj.weight"], found["model.norm.weight"]
    found["model.layers.2.self_attn.q_proj.weight"] = np.zeros((8, 9), np.float32)
    found["model.embed_tokens.weight"] = np.zeros((31, 8), np.int32)
    found["model.layers.3.mlp.up_proj.weight"] = np.zeros((12, 8), np.float32)
    save_file(found, folder / WEIGHTS)
    with pytest.raises(JpeftError) as caught:
        jpeft.models.load(folder)
    message = str(caught.value)
    for part in (
        str(folder),
        "missing (2): ",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "wrong shape or dtype (2): ",
        "model.layers.2.self_attn.q_proj.weight float32[8, 9], expected [8, 8]",
        "model.embed_tokens.weight int32[31, 8]",
        "unexpected (1): model.layers.3.mlp.up_proj.weight",
    ):
        assert part in message


def test_long_reports_are_cut(folder):
    save_file({"other": np.zeros(1, np.float32)}, folder / WEIGHTS)
    with pytest.raises(JpeftError, match="and 10 more"):
        jpeft.models.load(folder)


def test_configuration_that_asks_for_more_than_the_file_has_allocates_nothing(folder):
    config(folder, vocab_size=2**31 - 1, hidden_size=2**20, num_hidden_layers=1000)
    with pytest.raises(JpeftError, match=r"missing \(\d+\)"):
        jpeft.models.load(folder)
    config(folder, num_hidden_layers=10**6)
    with pytest.raises(JpeftError, match="num_hidden_layers"):
        jpeft.models.load(folder)


# Heads


def test_a_new_head_is_trainable_and_depends_on_the_seed_alone(model, folder):
    first = jpeft.models.load(folder, task="sequence-classification", num_labels=3)
    again = jpeft.models.load(folder, task="sequence-classification", num_labels=3)
    other = jpeft.models.load(folder, task="sequence-classification", num_labels=3, rngs=nnx.Rngs(1))
    assert type(first.score.kernel) is Trainable
    assert first.score.kernel.get_metadata()["group"] == "head"
    assert first.score.kernel.shape == (8, 3)
    assert first.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert 0.005 < float(jnp.std(first.score.kernel[...])) < 0.05
    equal(first, again)
    assert not np.array_equal(first.score.kernel[...], other.score.kernel[...])
    np.testing.assert_array_equal(first.embed_tokens.embedding[...], model.embed_tokens.embedding[...])
    assert first(IDS).shape == (2, 3)


def test_a_head_in_the_file_is_used_unless_other_classes_are_asked_for(folder):
    tuned = jpeft.models.load(folder, task="sequence-classification", num_labels=3, pooling="mean")
    saved = jpeft.models.save(tuned, folder / "tuned")
    loaded = jpeft.models.load(saved)
    assert loaded.pooling == "mean"
    assert type(loaded.score.kernel) is nnx.Param
    np.testing.assert_array_equal(loaded(IDS), tuned(IDS))
    other = jpeft.models.load(saved, num_labels=5)
    assert type(other.score.kernel) is Trainable
    assert other(IDS).shape == (2, 5)


def test_a_new_head_is_float32_on_a_half_precision_model(folder):
    model = jpeft.models.load(folder, task="sequence-classification", dtype="bfloat16")
    assert model.score.kernel.dtype == jnp.float32
    assert model.norm.scale.dtype == jnp.bfloat16


def test_a_missing_language_head_is_an_error(folder):
    found = tensors(folder)
    del found["lm_head.weight"]
    save_file(found, folder / WEIGHTS)
    with pytest.raises(JpeftError, match=r"missing \(1\): lm_head.weight"):
        jpeft.models.load(folder)
    jpeft.models.load(folder, task="base")


def test_the_file_decides_whether_embeddings_are_tied(model, folder):
    config(folder, tie_word_embeddings=True)
    loaded = jpeft.models.load(folder)
    assert not loaded.config.tie_word_embeddings
    equal(loaded, model)
    found = tensors(folder)
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    save_file(found, folder / WEIGHTS)
    tied = jpeft.models.load(folder)
    assert tied.config.tie_word_embeddings
    assert not hasattr(tied, "lm_head")


def test_tasks_and_settings_are_checked(folder):
    for settings, part in (
        ({"task": "casual-lm"}, "causal-lm"),
        ({"task": "masked-lm"}, "causal-lm"),
        ({"pooling": "max"}, "mean"),
        ({"pooling": "mean"}, "sequence-classification"),
        ({"attention": "flash"}, "cudnn"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"num_labels": True}, "num_labels"),
    ):
        with pytest.raises(JpeftError, match=part):
            jpeft.models.load(folder, **settings)
    config(folder, architectures=["LlamaForTokenClassification"])
    with pytest.raises(JpeftError, match="LlamaForTokenClassification"):
        jpeft.models.load(folder)
    jpeft.models.load(folder, task="causal-lm")


def test_a_configuration_from_transformers_itself():
    """`config.to_dict()`, with numbers as keys and keys that are no business of ours."""
    raw = {**LLAMA, "id2label": {0: "no", 1: "yes"}, "dtype": jnp.float32, "return_dict": True}
    model = jpeft.models.from_config(raw, task="sequence-classification")
    assert model.config.labels == ("no", "yes")
    assert model.config.raw["id2label"] == {"0": "no", "1": "yes"}
    with pytest.raises(JpeftError, match="found str"):
        jpeft.models.from_config("some/name")


def test_abstract_models():
    model = nnx.eval_shape(lambda: jpeft.models.from_config(LLAMA))
    assert isinstance(model.layers.layer.mlp.up_proj.kernel.get_value(), jax.ShapeDtypeStruct)
    assert model.layers.layer.mlp.up_proj.kernel.shape == (3, 8, 12)


def test_an_eager_call_compiles_once_per_shape(model):
    from jpeft.models.model import _jitted

    before = _jitted._cache_size()
    ids = np.ones((5, 3), np.int32)
    model(ids)
    model(ids + 1)
    jpeft.models.from_config(LLAMA, rngs=nnx.Rngs(8))(ids)
    assert _jitted._cache_size() == before + 1
    model(ids[1:])
    assert _jitted._cache_size() == before + 2


def test_bad_inputs_are_refused(model):
    for arguments, part in (
        ((IDS[0],), "input_ids"),
        ((IDS.astype(np.float32),), "input_ids"),
        ((IDS, np.ones((2, 4))), "attention_mask"),
        ((IDS, None, np.zeros((1, 5), np.int32)), "positions"),
    ):
        with pytest.raises(JpeftError, match=part):
            model(*arguments)
    with pytest.raises(JpeftError, match="cache"):
        model(IDS, cache=model.init_cache(2, 4))


# Sources that do not exist or are not what they seem


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c", tmp_path / "none.gguf"):
        with pytest.raises(JpeftError, match="no such"):
            jpeft.models.load(source)
    with pytest.raises(JpeftError, match="neither a folder here nor a hub id"):
        jpeft.models.load("not a name!")
    with pytest.raises(JpeftError, match=r"config\.json"):
        jpeft.models.load(tmp_path)


def test_a_hub_id_offline(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = {}

    def offline(name, **settings):
        asked.update(settings, name=name)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(JpeftError, match="Check the name and the connection"):
        jpeft.models.load("someone/some-model", revision="v1")
    assert asked["name"] == "someone/some-model"
    assert asked["revision"] == "v1"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_id_is_loaded_from_the_snapshot(model, folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: str(folder))
    equal(jpeft.models.load("someone/some-model"), model)


class _Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_a_pickle_is_refused_unopened(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(JpeftError, match=r"pytorch_model\.bin.*pickles"):
        jpeft.models.load(folder)
    (folder / WEIGHTS).write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(JpeftError, match="not a safetensors file"):
        jpeft.models.load(folder)
    assert not (tmp_path / "trapped").exists()


def test_remote_code_is_never_run(model, folder):
    config(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('executed')")
    equal(jpeft.models.load(folder), model)
    config(folder, model_type="evil")
    with pytest.raises(JpeftError, match="'evil' is not one of the families"):
        jpeft.models.load(folder)


def lie(folder, change, data=b"\0" * 16, size=None):
    """A safetensors file whose header is what `change` makes of an honest one."""
    header = change({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "more bytes than shape": ({**ENTRY, "data_offsets": [0, 12]}, "takes 8 bytes"),
    "beyond the end": ({**ENTRY, "data_offsets": [16, 24]}, "truncated or damaged"),
    "backwards": ({**ENTRY, "data_offsets": [8, 0]}, "takes 8 bytes"),
    "negative": ({**ENTRY, "data_offsets": [-8, 0]}, "natural numbers"),
    "negative shape": ({**ENTRY, "shape": [-1, -2]}, "natural numbers"),
    "huge shape": ({**ENTRY, "shape": [2**62, 2**62, 0, 2**63]}, "natural numbers"),
    "overflowing shape": ({**ENTRY, "shape": [2**62, 4]}, "takes"),
    "float shape": ({**ENTRY, "shape": [2.0]}, "natural numbers"),
    "unknown dtype": ({**ENTRY, "dtype": "F5"}, "dtype 'F5'"),
    "no dtype": ({"shape": [2], "data_offsets": [0, 8]}, "no dtype"),
    "not an object": ([1, 2], "no dtype"),
    "three offsets": ({**ENTRY, "data_offsets": [0, 4, 8]}, "natural numbers"),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(folder, name):
    entry, message = LIES[name]
    lie(folder, lambda header: {**header, "b": entry})
    with pytest.raises(JpeftError, match=message):
        jpeft.models.load(folder)


def test_overlapping_tensors(folder):
    lie(folder, lambda header: {**header, "b": {**ENTRY, "data_offsets": [4, 12]}})
    with pytest.raises(JpeftError, match="overlap"):
        jpeft.models.load(folder)


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        (lambda header: b'{"a": 1, "a": 2}', None, "stand twice"),
        (lambda header: b'{"a": NaN}', None, "NaN"),
        (lambda header: b"[]", None, "expected a JSON object"),
        (lambda header: b"\xff\xfe", None, "not valid JSON"),
        (lambda header: b"[" * 100_000, None, "not valid JSON"),
        (lambda header: header, 2**63, "announce"),
        (lambda header: header, 10**6, "announce"),
        (lambda header: header, 0, "announce"),
    ],
)
def test_headers_that_are_none(folder, change, size, message):
    lie(folder, change, size=size)
    with pytest.raises(JpeftError, match=message):
        jpeft.models.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_truncated_files(folder, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(JpeftError, match="truncated"):
        jpeft.models.load(folder)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "../outside.safetensors"}, "beside it"),
        ({"a": "/etc/outside.safetensors"}, "beside it"),
        ({"a": "sub/part.safetensors"}, "beside it"),
        ({"a": "..\\outside.safetensors"}, "beside it"),
        ({"a": "pytorch_model.bin"}, "beside it"),
        ({"a": ".."}, "beside it"),
        ({"a": ""}, "beside it"),
        ({"a": "absent.safetensors"}, "is missing"),
        ({"a": 3}, "weight_map is not"),
        ([], "weight_map is not"),
        ({}, "weight_map is not"),
        ({"a": "part.safetensors"}, "'a' is not in"),
    ],
)
def test_an_index_that_lies(folder, table, message):
    for path in (folder / "part.safetensors", folder.parent / "outside.safetensors"):
        path.write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    with pytest.raises(JpeftError, match=message):
        jpeft.models.load(folder)


def test_a_tensor_in_two_shards(folder):
    one, two = folder / "one.safetensors", folder / "two.safetensors"
    one.write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).rename(two)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": one.name, "model.norm.weight": two.name}}))
    with pytest.raises(JpeftError, match=r"stands in one\.safetensors and two\.safetensors"):
        jpeft.models.load(folder)


# config.json


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"model_type": "llama", "model_type": "mistral"}',
        '{"model_type": "llama", "rms_norm_eps": NaN}',
        '{"model_type": "llama", "rms_norm_eps": Infinity}',
        "{}",
        '{"model_type": 3}',
        '{"model_type": ["llama"]}',
    ],
)
def test_config_files_that_are_none(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(JpeftError):
        jpeft.models.load(folder)


BAD_VALUES = [
    ("vocab_size", "31"),
    ("vocab_size", -1),
    ("vocab_size", 2**40),
    ("hidden_size", 8.0),
    ("hidden_size", None),
    ("hidden_size", 9),
    ("num_hidden_layers", True),
    ("num_hidden_layers", 0),
    ("num_attention_heads", [4]),
    ("num_key_value_heads", 3),
    ("head_dim", 5),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", 1e400),
    ("hidden_act", "exec"),
    ("hidden_act", {"a": 1}),
    ("tie_word_embeddings", "false"),
    ("attention_bias", 1),
    ("initializer_range", -0.1),
    ("pad_token_id", "x"),
    ("eos_token_id", [1, "x"]),
    ("eos_token_id", True),
    ("id2label", ["a"]),
    ("id2label", {"x": "a"}),
    ("id2label", {"0": 3}),
    ("id2label", {"1": "a"}),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", [None]),
    ("rope_theta", -1),
    ("rope_scaling", "linear"),
    ("rope_scaling", {"rope_type": "linear"}),
    ("rope_scaling", {"rope_type": "linear", "factor": 0.5}),
    ("rope_scaling", {"rope_type": "longrope", "factor": 2}),
    ("rope_scaling", {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}),
    ("rope_parameters", {"rope_type": "yarn", "factor": True}),
    ("partial_rotary_factor", 0.5),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_config_values_that_are_wrong(folder, key, value):
    config(folder, **{key: value})
    with pytest.raises(JpeftError, match=key if key != "rms_norm_eps" or value != 1e400 else "Infinity"):
        jpeft.models.load(folder)


def test_absent_keys_have_the_defaults_of_transformers(folder):
    for key in ("rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_theta"):
        config(folder, **{key: ...})
    parsed = jpeft.models.load(folder).config
    assert (parsed.rms_norm_eps, parsed.hidden_act, parsed.rope.theta) == (1e-6, "silu", 10000.0)


def test_host_memory_holds_the_model_once(tmp_path):
    large = {**LLAMA, "vocab_size": 4000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 20}
    folder = jpeft.models.save(jpeft.models.from_config(large), tmp_path)
    size = (folder / WEIGHTS).stat().st_size
    largest = 4 * 20 * 64 * 128
    tracemalloc.start()
    model = jpeft.models.load(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) < 2 * largest
    assert peak < size + 3 * largest


def test_a_source_reads_one_tensor_at_a_time(folder):
    raw, source = open_source(folder)
    assert raw["model_type"] == "llama"
    assert source.tensors["model.norm.weight"].shape == (8,)
    view = source.read("model.norm.weight")
    assert not view.flags.writeable
    np.testing.assert_array_equal(view, tensors(folder)["model.norm.weight"])
