"""Writes adapterhub.json: names and shapes of AdapterHub's files, and the logits of its models.

Runs in an environment of its own, since the library needs an older transformers:

    pip install adapters==1.3.0 torch
    python tests/interop/adapterhub_reference.py

Values are a function of a tensor's name, so that only names, shapes and logits are kept.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "pad_token_id": 0}
BASES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **HIDDEN, **HEADS, "max_position_embeddings": 32},
    "roberta": {"model_type": "roberta", **HIDDEN, **HEADS, "max_position_embeddings": 32},
    "llama": {"model_type": "llama", **HIDDEN, **HEADS, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "houlsby": {"architecture": "double_seq_bn", "reduction_factor": 4},
    "pfeiffer": {"architecture": "seq_bn", "original_ln_before": False, "reduction_factor": 4, "leave_out": [0]},
    "widths": {"architecture": "double_seq_bn", "reduction_factor": {"0": 8, "default": 4}},
    "parallel": {"architecture": "par_bn", "reduction_factor": 4},
    "learned": {"architecture": "scaled_par_bn", "reduction_factor": 8},
}
ENCODERS, SERIAL = ("bert", "roberta"), ("houlsby", "pfeiffer")
ONE_AFTER = (*SERIAL, "widths")
FUSED = ("first", "second")  # two tasks, for each configuration of SERIAL on these bases:
FUSIONS = ("bert", "llama")
IDS = [[5, 9, 11, 3, 8, 21], [7, 30, 2, 4, 17, 6]]


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor called `name`."""
    places = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    start = zlib.crc32(name.encode()) % 1000
    made = 0.4 * np.sin(places * 0.7 + start) + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
    return made.astype(np.float32)


def built(base: str) -> Any:
    """AdapterHub's model of a base."""
    import adapters
    import torch
    import transformers

    fields = dict(BASES[base])
    task = transformers.AutoModelForSequenceClassification if base in ENCODERS else None
    chosen = transformers.AutoConfig.for_model(fields.pop("model_type"), num_labels=3, **fields)
    model = (task or transformers.AutoModelForCausalLM).from_config(chosen, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(values(name, tuple(parameter.shape))))
    adapters.init(model)
    return model


def configured(config: str) -> Any:
    import adapters

    wanted = dict(CONFIGS[config])
    return adapters.AdapterConfig.load(wanted.pop("architecture"), **wanted)


def answered(model: Any) -> list[float]:
    """The logits, with every adapter's parameters set."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name or ".adapter_fusion_layer." in name:
                parameter.copy_(torch.tensor(values(name, tuple(parameter.shape))))
        logits = model.eval()(torch.tensor(IDS)).logits
    return [round(float(value), 7) for value in logits.flatten()]


def saved(folder: Path, config: str, weights: str) -> dict[str, Any]:
    """What is kept of a folder."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / weights)
    for name, value in tensors.items():
        assert np.array_equal(value, values(name, value.shape)), name
    return {
        "config": json.loads((folder / config).read_text()),
        "tensors": {name: list(value.shape) for name, value in sorted(tensors.items())},
    }


def case(base: str, config: str) -> dict[str, Any]:
    model = built(base)
    model.add_adapter("task", config=configured(config), set_active=True)
    logits = answered(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder, "task", with_head=False, use_safetensors=True)
        return {**saved(Path(folder), "adapter_config.json", "adapter.safetensors"), "logits": logits}


def fusion(base: str, config: str) -> dict[str, Any]:
    from adapters.composition import Fuse

    model = built(base)
    for name in FUSED:
        model.add_adapter(name, config=configured(config))
    model.add_adapter_fusion(list(FUSED))
    model.active_adapters = Fuse(*FUSED)
    logits = answered(model)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_adapter_fusion(str(place / "fusion"), list(FUSED), use_safetensors=True)
        made = saved(place / "fusion", "adapter_fusion_config.json", "model_adapter_fusion.safetensors")
        for name in FUSED:
            model.save_adapter(str(place / name), name, with_head=False, use_safetensors=True)
            made[name] = saved(place / name, "adapter_config.json", "adapter.safetensors")
    return {**made, "logits": logits}


def main() -> None:
    import adapters
    import transformers

    pairs = [(base, config) for base in BASES for config in CONFIGS if base in ENCODERS or config in ONE_AFTER]
    cases = {f"{base}-{config}": case(base, config) for base, config in pairs}
    versions = {"adapters": adapters.__version__, "transformers": transformers.__version__}
    fusions = {f"{base}-{config}": fusion(base, config) for base in FUSIONS for config in SERIAL}
    text = json.dumps({"versions": versions, "cases": cases, "fusions": fusions})
    (Path(__file__).parent / "adapterhub.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
