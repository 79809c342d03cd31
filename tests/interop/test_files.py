"""Errors and properties of PEFT files that need no peer: what is refused, and by which name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft import expressions
from jpeft.errors import JpeftError
from tests import zoo

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base(name: str = "llama") -> Any:
    return zoo.MODELS[name].make("float32")


@pytest.fixture(scope="module")
def llama() -> Any:
    return base()


def trained(model: Any, method: Any) -> Any:
    parts = jpeft.partition(method(model, rngs=0))
    return jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)


@pytest.fixture(scope="module")
def saved(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that save_peft wrote."""
    method = jpeft.LoRA(rank=2, alpha=3, targets=["q_proj", "down_proj"], layers=[0, 2])
    return jpeft.save_peft(trained(llama, method), tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, **fields: Any) -> Path:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**raw, **fields}))
    return folder


def retensor(folder: Path, function: Any) -> Path:
    tensors = load_file(folder / WEIGHTS)
    function(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_what_is_written(llama: Any, saved: Path) -> None:
    raw = json.loads((saved / CONFIG).read_text())
    assert raw["peft_type"] == "LORA"
    assert (raw["r"], raw["lora_alpha"], raw["inference_mode"], raw["task_type"]) == (2, 3, True, "CAUSAL_LM")
    assert raw["target_modules"] == sorted(
        f"model.layers.{layer}.{name}" for layer in (0, 2) for name in ("mlp.down_proj", "self_attn.q_proj")
    )
    assert sorted(path.name for path in saved.parent.iterdir()) == ["adapter"]  # nothing is left behind
    loaded = jpeft.load_peft(llama, saved)
    again = load_file(jpeft.save_peft(loaded, saved.parent / "again") / WEIGHTS)
    first = load_file(saved / WEIGHTS)
    assert again.keys() == first.keys()
    assert all(np.array_equal(again[name], first[name]) for name in first)
    assert first[f"{Q}.lora_A.weight"].shape == (2, zoo.WIDTH)
    parts, plain = jpeft.partition(loaded), jpeft.partition(llama)
    assert all(parts.frozen[key] is array for key, array in plain.frozen.items())
    assert jpeft.applied(loaded)[0].layers is None


def test_targets_stay_readable(llama: Any, tmp_path: Path) -> None:
    adapted = trained(
        llama,
        jpeft.LoRA(
            rank=2,
            targets=["q_proj", "up_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 4, "up_proj": 3, "layers.1": 0},
        ),
    )
    raw = json.loads((jpeft.save_peft(adapted, tmp_path / "some") / CONFIG).read_text())
    assert raw["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 4, "up_proj": 3}
    again = jpeft.load_peft(llama, tmp_path / "some")
    assert zoo.relative(again(zoo.ids()), adapted(zoo.ids())) < 1e-6
    every = trained(llama, jpeft.LoRA(rank=2, targets=["q_proj", "up_proj"]))
    folder = jpeft.save_peft(every, tmp_path / "every")
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == ["q_proj", "up_proj"]
    assert jpeft.applied(jpeft.load_peft(llama, folder))[0].targets == ("q_proj", "up_proj")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "LORRA"}, "peft_type 'LORRA'.*LORA"),
    "no kind": ({"peft_type": None}, "peft_type 'None'"),
    "task": ({"task_type": "CHAT"}, "task_type = 'CHAT'"),
    "rank": ({"r": 0}, "r = 0"),
    "rank of another type": ({"r": "8"}, "r = '8'"),
    "truth value": ({"r": True}, "r = True"),
    "alpha": ({"lora_alpha": None}, "lora_alpha = None"),
    "large alpha": ({"lora_alpha": 10**400}, r"lora_alpha = 10+\.\.\.: expected a finite number"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
    "unsupported": (
        {"lora_bias": True, "layer_replication": [[0, 2]]},
        "layer_replication.*, lora_bias = True",
    ),
    "changed base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changes the base"),
    "misspelt": ({"target_modules": ["q_proj", "down_porj"]}, r"'down_porj' \(nearest: .*down_proj"),
    "no targets": ({"target_modules": None}, "target_modules = None"),
    "wrong kind": ({"target_modules": ["self_attn"]}, "'model.layers.0.self_attn', a SelfAttention"),
    "layers": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, r"layers \[7\]"),
    "negative layer": ({"layers_to_transform": [-1]}, r"layers_to_transform = \[-1\]"),
    "rank pattern": ({"rank_pattern": {"q_porj": 3}}, r"'q_porj' \(nearest: .*q_proj"),
    "rank in a pattern": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern = .*whole numbers from 1"),
    "alpha in a pattern": ({"alpha_pattern": {"q_proj": "big"}}, "alpha_pattern = .*a finite number"),
    "other ranks": ({"r": 3}, r"q_proj.lora_A.weight has shape \[2, 12\], expected \[3, 12\]"),
    "more targets": ({"target_modules": ["q_proj", "down_proj"]}, r"missing \(4\): .*layers.1.self_attn.q_proj.lora_A"),
    "bad expression": ({"target_modules": "(q_proj"}, "not used: missing \\)"),
    "slow expression": ({"target_modules": r"(.*)*q_proj"}, "repeats what repeats itself"),
    "slow pattern": ({"rank_pattern": {r"(a|aa)+$": 3}}, "repeats a choice"),
    "saved": ({"modules_to_save": ["norm"]}, "missing.*model.norm.weight"),
    "bias": ({"bias": "some"}, "bias = 'some'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_fields(case: str, llama: Any, copy: Path) -> None:
    fields, said = REFUSED[case]
    with pytest.raises(JpeftError, match=said):
        jpeft.load_peft(llama, change(copy, **fields))


def test_unknown_fields_are_named_in_one_warning(llama: Any, copy: Path) -> None:
    change(copy, of_the_future=[1], also=True, idle=None, qalora_group_size=32, megatron_core="other")
    with pytest.warns(UserWarning, match="LORA are ignored: also, of_the_future$") as said:
        jpeft.load_peft(llama, copy)
    assert len(said) == 1


def _drop(tensors: dict[str, Any]) -> None:
    del tensors[f"{Q}.lora_B.weight"]


def _misnamed(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_Q.weight"] = tensors.pop(f"{Q}.lora_A.weight")


def _integers(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_A.weight"] = tensors[f"{Q}.lora_A.weight"].astype(np.int32)


def _not_a_number(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_A.weight"][1, 2] = np.nan


def _turned(tensors: dict[str, Any]) -> None:
    tensors[f"{Q}.lora_A.weight"] = np.ascontiguousarray(tensors[f"{Q}.lora_A.weight"].T)


def _base(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.weight"] = np.ones((zoo.VOCABULARY, zoo.WIDTH), np.float32)


TENSORS = {
    _drop: "missing.*q_proj.lora_B",
    _misnamed: r"missing.*q_proj.lora_A(.|\n)*unexpected.*q_proj.lora_Q.weight \(nearest",
    _integers: "lora_A.weight is int32",
    _not_a_number: "lora_A.weight holds values that are not finite",
    _turned: r"has shape \[12, 2\], expected \[2, 12\]",
    _base: "changes weights of the base model.*lm_head.weight",
}


@pytest.mark.parametrize("function", TENSORS)
def test_refused_tensors(function: Any, llama: Any, copy: Path) -> None:
    with pytest.raises(JpeftError, match=TENSORS[function]):
        jpeft.load_peft(llama, retensor(copy, function))


def test_damaged_files(llama: Any, copy: Path) -> None:
    whole = (copy / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    lying = whole[8 : 8 + length].replace(b'"shape":[2', b'"shape":[3', 1).replace(b'"shape": [2', b'"shape": [3', 1)
    assert lying != whole[8 : 8 + length]
    for damaged in (whole[:-9], whole[:20], b"", struct.pack("<Q", 2**60), whole[:8] + lying + whole[8 + length :]):
        (copy / WEIGHTS).write_bytes(damaged)
        with pytest.raises(JpeftError, match=WEIGHTS):
            jpeft.load_peft(llama, copy)
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    with pytest.raises(JpeftError, match=r"\['adapter_model.bin'\]. A pickle can run code"):
        jpeft.load_peft(llama, copy)
    for text in ('{"r": NaN}', '{"r": 1, "r": 2}', "[]", "{", "[" * 100_000):
        (copy / CONFIG).write_text(text)
        with pytest.raises(JpeftError, match=CONFIG):
            jpeft.load_peft(llama, copy)
    (copy / CONFIG).unlink()
    with pytest.raises(JpeftError, match="has no adapter_config.json"):
        jpeft.load_peft(llama, copy)
    with pytest.raises(JpeftError, match="there is no folder"):
        jpeft.load_peft(llama, copy / "nowhere")


def test_expressions_end_soon() -> None:
    name = "base." * 30
    for hostile in (r"(a+)+$", r"(\w+\.)*x", r"(a|a)*b", r"(a?){30}b", r".*.*.*.*.*.*x", r"(.)\1", "(", "a" * 5000):
        with pytest.raises(JpeftError, match="regular expression"):
            expressions.compiled(hostile, "here")
    for usual in (r".*\.layers\.(1[0-9]|2[0-3])\.(self_attn|mlp)\.(q|v)_proj", r"(.*?\.)?(?!lm_head).*_proj"):
        expressions.compiled(usual, "here").fullmatch(name)


def test_what_cannot_be_written(llama: Any, saved: Path, tmp_path: Path) -> None:
    lora = jpeft.LoRA(rank=2, targets="q_proj")
    gpt2 = base("gpt2")
    refused = {
        "the model has none": llama,
        "the model has LoRA, LoRA": jpeft.compose(lora, jpeft.LoRA(rank=2, name="second"))(llama, rngs=0),
        "BitFit here trains others": jpeft.compose(jpeft.LoRA(rank=2, targets="c_attn"), jpeft.BitFit(targets="c_fc"))(
            gpt2, rngs=0
        ),
        "'transformer.wte' is adapted": jpeft.LoRA(rank=2, targets="wte")(gpt2, rngs=0),
        "expected a model of jpeft.models": lora,
        r"position=\(0, 2\)": jpeft.PromptTuning(num_virtual_tokens=2, position=(0, 2))(llama, rngs=0),
        "prefix tuning of encoder-decoders": jpeft.PTuningV2(num_virtual_tokens=2)(base("t5"), rngs=0),
        "is on every layer of layers/self_attn": jpeft.PTuningV2(num_virtual_tokens=2, layers=[1])(llama, rngs=0),
    }
    for said, model in refused.items():
        with pytest.raises(JpeftError, match=said):
            jpeft.save_peft(model, tmp_path / "new")
    adapted = lora(llama, rngs=0)
    with pytest.raises(JpeftError, match="exists; choose another"):
        jpeft.save_peft(adapted, saved)
    with pytest.raises(JpeftError, match="is no PEFT adapter"):
        jpeft.save_peft(adapted, tmp_path, overwrite=True)
    assert not list(tmp_path.iterdir())
    jpeft.save_peft(adapted, tmp_path / "new", base_model="some/base")
    jpeft.save_peft(trained(llama, lora), tmp_path / "new", overwrite=True)
    assert np.any(load_file(tmp_path / "new" / WEIGHTS)[f"{Q}.lora_B.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_quantised_and_sharded_bases(llama: Any, saved: Path, tmp_path: Path) -> None:
    small = base("llama-nf4")
    adapted = trained(small, jpeft.LoRA(rank=2))
    again = jpeft.load_peft(small, jpeft.save_peft(adapted, tmp_path / "adapter"))
    assert jnp.array_equal(again(zoo.ids()), adapted(zoo.ids()))

    everywhere = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec())
    parts = jpeft.partition(llama)
    spread = jpeft.combine(parts.graphdef, {}, {}, jax.device_put(parts.frozen, everywhere))
    loaded = jpeft.load_peft(spread, saved)
    found = jpeft.partition(loaded)
    assert all(value.sharding == everywhere for value in (*found.adapter.values(), *found.buffers.values()))
    assert np.allclose(loaded(zoo.ids()), jpeft.load_peft(llama, saved)(zoo.ids()), rtol=1e-5, atol=1e-6)


def test_a_prefix_beside_whole_layers(llama: Any, tmp_path: Path) -> None:
    """The prefix asks layers for their sizes, of which there is no array yet while a file is read."""
    both = jpeft.compose(jpeft.PTuningV2(num_virtual_tokens=2), jpeft.FullTuning(targets="k_proj"))
    folder = jpeft.save_peft(trained(llama, both), tmp_path / "adapter")
    assert len(jpeft.applied(jpeft.load_peft(llama, folder))) == 2


def test_the_wrong_task_is_told(tmp_path: Path) -> None:
    classifier = base("bert-mean-classifier")
    folder = jpeft.save_peft(jpeft.LoRA(rank=2, targets="query")(classifier, rngs=0), tmp_path / "adapter")
    tags = jpeft.models.from_config(zoo.FAMILIES["bert-mean-classifier"][0], task="masked-lm")
    with pytest.raises(JpeftError, match="the adapter is for SEQ_CLS, the model for 'masked-lm'"):
        jpeft.load_peft(tags, folder)


def test_bfloat16_and_second_adapters(llama: Any, saved: Path, tmp_path: Path) -> None:
    half = trained(llama, jpeft.LoRA(rank=2, targets="o_proj", dtype="bfloat16", name="half"))
    folder = jpeft.save_peft(half, tmp_path / "half")
    assert load_file_dtype(folder) == {"bfloat16"}
    both = jpeft.load_peft(half, saved)
    assert {type(method).__name__ for method in jpeft.applied(both)} == {"LoRA"}
    alone = jpeft.load_peft(llama, saved)
    keys = jpeft.partition(alone).adapter
    assert all(jnp.array_equal(jpeft.partition(both).adapter[key], value) for key, value in keys.items())
    assert jnp.array_equal(
        jpeft.partition(both).adapter["layers/self_attn/o_proj/half/a"],
        jpeft.partition(half).adapter["layers/self_attn/o_proj/half/a"],
    )


def load_file_dtype(folder: Path) -> set[str]:
    from jpeft.models.tensors import SafetensorsFile

    return {info.dtype.name for info in SafetensorsFile(folder / WEIGHTS).tensors.values()}
