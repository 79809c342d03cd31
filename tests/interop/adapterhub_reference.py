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
    "parallel": {"architecture": "par_bn", "reduction_factor": 4},
    "learned": {"architecture": "scaled_par_bn", "reduction_factor": 8},
}
ENCODERS, SERIAL = ("bert", "roberta"), ("houlsby", "pfeiffer")
IDS = [[5, 9, 11, 3, 8, 21], [7, 30, 2, 4, 17, 6]]


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor called `name`."""
    places = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    start = zlib.crc32(name.encode()) % 1000
    made = 0.4 * np.sin(places * 0.7 + start) + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
    return made.astype(np.float32)


def case(base: str, config: str) -> dict[str, Any]:
    import adapters
    import torch
    import transformers
    from safetensors.numpy import load_file

    fields = dict(BASES[base])
    task = transformers.AutoModelForSequenceClassification if base in ENCODERS else None
    chosen = transformers.AutoConfig.for_model(fields.pop("model_type"), num_labels=3, **fields)
    model = (task or transformers.AutoModelForCausalLM).from_config(chosen, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(values(name, tuple(parameter.shape))))
    adapters.init(model)
    wanted = dict(CONFIGS[config])
    model.add_adapter("task", config=adapters.AdapterConfig.load(wanted.pop("architecture"), **wanted), set_active=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.copy_(torch.tensor(values(name, tuple(parameter.shape))))
        logits = model.eval()(torch.tensor(IDS)).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder, "task", with_head=False, use_safetensors=True)
        tensors = load_file(Path(folder) / "adapter.safetensors")
        for name, value in tensors.items():
            assert np.array_equal(value, values(name, value.shape)), name
        return {
            "config": json.loads((Path(folder) / "adapter_config.json").read_text()),
            "tensors": {name: list(value.shape) for name, value in sorted(tensors.items())},
            "logits": [round(float(value), 7) for value in logits.flatten()],
        }


def main() -> None:
    import adapters
    import transformers

    pairs = [(base, config) for base in BASES for config in CONFIGS if base in ENCODERS or config in SERIAL]
    cases = {f"{base}-{config}": case(base, config) for base, config in pairs}
    versions = {"adapters": adapters.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, "cases": cases})
    (Path(__file__).parent / "adapterhub.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
