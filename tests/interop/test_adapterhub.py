"""AdapterHub's files: logits of its own models, which adapterhub_reference.py recorded in adapterhub.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.errors import JpeftError
from tests.interop.adapterhub_reference import BASES, ENCODERS, FUSED, IDS, values

RECORDED = json.loads((Path(__file__).parent / "adapterhub.json").read_text())
CASES, FUSIONS = RECORDED["cases"], RECORDED["fusions"]


def base(name: str, folder: Path) -> Any:
    """The model whose tensors are functions of their names."""
    task = "sequence-classification" if name in ENCODERS else "causal-lm"
    config = {**BASES[name], "id2label": {str(n): f"LABEL_{n}" for n in range(3)}}
    empty = jpeft.models.from_config(config, task=task)
    folder.mkdir()
    jpeft.models.save(empty, folder)
    stored = load_file(folder / "model.safetensors")
    save_file({key: values(key, array.shape) for key, array in stored.items()}, folder / "model.safetensors")
    return jpeft.models.load(folder, task=task)


def written(case: str, folder: Path, **changes: Any) -> Path:
    return put(CASES[case], folder, "adapter_config.json", "adapter.safetensors", **changes)


def put(recorded: dict[str, Any], folder: Path, config: str, weights: str, **changes: Any) -> Path:
    settings = {**recorded["config"], "config": {**recorded["config"]["config"], **changes}}
    folder.mkdir(parents=True)
    (folder / config).write_text(json.dumps(settings))
    save_file({name: values(name, tuple(shape)) for name, shape in recorded["tensors"].items()}, folder / weights)
    return folder


def fused(case: str, folder: Path, **changes: Any) -> Path:
    """The folder of a fusion, with those of its adapters beside it."""
    recorded = FUSIONS[case]
    for name in FUSED:
        put(recorded[name], folder / name, "adapter_config.json", "adapter.safetensors")
    files = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
    return put(recorded, folder / "fusion", *files, **changes)


@pytest.mark.parametrize("name", BASES)
def test_logits(name: str, tmp_path: Path) -> None:
    model = base(name, tmp_path / "base")
    plain = np.asarray(model(np.array(IDS)))
    for case in CASES:
        if case.startswith(f"{name}-"):
            made = np.asarray(jpeft.load_adapterhub(model, written(case, tmp_path / case))(np.array(IDS)))
            expected = np.array(CASES[case]["logits"]).reshape(made.shape)
            assert np.abs(made - expected).max() / np.abs(expected).max() < 1e-5, case
            assert np.abs(made - plain).max() > 1e-2


@pytest.mark.parametrize("case", FUSIONS)
def test_a_fusion(case: str, tmp_path: Path) -> None:
    model = base(case.split("-", maxsplit=1)[0], tmp_path / "base")
    folder = fused(case, tmp_path / "saved")
    loaded = jpeft.load_adapterhub(model, folder)
    made = np.asarray(loaded(np.array(IDS)))
    expected = np.array(FUSIONS[case]["logits"]).reshape(made.shape)
    assert np.abs(made - expected).max() / np.abs(expected).max() < 1e-5
    (method,) = jpeft.applied(loaded)
    assert (method.kind, method.tasks, method.regularization) == ("adapter_fusion", 2, 0.01)
    assert {jpeft.param_labels(loaded)[key] for key in jpeft.partition(loaded).adapter} == {"fusion"}
    jpeft.save_adapter(tmp_path / "ours", loaded)
    again = jpeft.load_adapter(tmp_path / "ours", model)
    assert np.array_equal(again(np.array(IDS)), made)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return base("llama", tmp_path_factory.mktemp("llama") / "base")


REFUSED = {
    "own norm first": ({"original_ln_before": True}, "without original_ln_before = True"),
    "gate": ({"use_gating": True, "phm_layer": True}, "phm_layer = True, use_gating = True"),
    "invertible": ({"inv_adapter": "nice"}, "inv_adapter = 'nice'"),
    "parallel": ({"is_parallel": True, "mh_adapter": False}, "what no norm has seen"),
    "post_add": ({"residual_before_ln": "post_add"}, "'post_add' have no counterpart"),
    "activation": ({"non_linearity": "softplus"}, "non_linearity = 'softplus'"),
    "no adapter": ({"mh_adapter": False, "output_adapter": False}, "there is no adapter"),
    "one of two": ({"mh_adapter": False}, r"unexpected \(8\).*attention_adapters"),
    "layers": ({"leave_out": [1]}, r"unexpected \(8\): model.layers.1"),
    "other kind": ({"architecture": "lora"}, "no bottleneck adapter .architecture 'lora'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, llama: Any, tmp_path: Path) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(JpeftError, match=said):
        jpeft.load_adapterhub(llama, written("llama-houlsby", tmp_path / "adapter", **changes))


def test_other_files(llama: Any, tmp_path: Path) -> None:
    folder = written("llama-houlsby", tmp_path / "adapter")
    with pytest.raises(JpeftError, match="peft_type 'None'"):
        jpeft.load_peft(llama, folder)
    tensors = load_file(folder / "adapter.safetensors")
    save_file({name.replace(".task.", ".x."): value for name, value in tensors.items()}, folder / "adapter.safetensors")
    with pytest.raises(JpeftError, match=r"missing \(16\).*adapters.task"):
        jpeft.load_adapterhub(llama, folder)
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(JpeftError, match="A pickle can run code"):
        jpeft.load_adapterhub(llama, folder)


def test_fusions_that_are_refused(llama: Any, tmp_path: Path) -> None:
    def said(folder: Path, **given: Any) -> str:
        with pytest.raises(JpeftError) as error:
            jpeft.load_adapterhub(llama, folder, **given)
        return str(error.value)

    case = "llama-houlsby"
    assert "residual_before = True" in said(fused(case, tmp_path / "residual", residual_before=True))
    assert "value = false" in said(fused(case, tmp_path / "static", value=False))
    folder = fused(case, tmp_path / "alone")
    (tmp_path / "alone" / "second").rename(tmp_path / "elsewhere")
    assert "the adapter 'second' is not in" in said(folder)
    first = tmp_path / "alone" / "first"
    assert "['second'] are not in adapters=" in said(folder, adapters=[first])
    found = jpeft.load_adapterhub(llama, folder, adapters=[tmp_path / "elsewhere", first])
    assert jpeft.applied(found)[0].kind == "adapter_fusion"
    assert "is no fusion" in said(first, adapters=[first])
    other = put(FUSIONS["llama-pfeiffer"]["second"], tmp_path / "p", "adapter_config.json", "adapter.safetensors")
    assert "of one kind and size" in said(folder, adapters=[other, first])
    names = {**FUSIONS[case], "config": {**FUSIONS[case]["config"], "adapter_names": ["../first", "second"]}}
    files = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
    assert "'../first' is not in" in said(put(names, tmp_path / "names" / "fusion", *files))
    stored = load_file(folder / files[1])
    save_file({name: value for name, value in stored.items() if "query.bias" not in name}, folder / files[1])
    assert "missing (4)" in said(folder, adapters=[tmp_path / "elsewhere", first])
