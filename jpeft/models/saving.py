"""Saving a model as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft import paths, surgery
from jpeft.errors import JpeftError
from jpeft.models.families import Slot, checkpoint_key, family, slots
from jpeft.models.model import Model
from jpeft.models.packed import packed_tensors, quantization_config
from jpeft.models.tensors import WEIGHTS, TensorInfo, write_safetensors, write_whole
from jpeft.quant import QuantizedLinear
from jpeft.wrapper import Wrapper, innermost


def save(model: Model, folder: str | Path) -> Path:
    """Writes config.json and model.safetensors, which transformers loads to the same logits.

    Layers quantised as NF4, FP4 or Int8() are written as bitsandbytes has them.

    Every file appears whole or not at all, config.json last. `pooling="mean"` is written as `classifier_pooling`, which
    `load` reads; transformers' own classifiers pool in their own way whatever it says.

    Raises JpeftError for a model with wrappers in it (merge them first) and for a folder that cannot be written.
    """
    if not isinstance(model, Model):
        wrapped = isinstance(model, Wrapper)
        raise JpeftError(
            _WRAPPED if wrapped else f"save: expected a model of jpeft.models, found {type(model).__name__}"
        )
    wrappers = [path for path, module in surgery.modules(model) if isinstance(module, Wrapper)]
    if wrappers:
        at = [".".join(map(str, path)) for path in wrappers[:5]]
        raise JpeftError(f"{_WRAPPED} ({len(wrappers)} wrappers, such as {at})")
    found = family(model.config.model_type)
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    sources: dict[str, tuple[Slot, int]] = {}
    tensors: dict[str, TensorInfo] = {}
    packed = {
        node.path: (node, module)
        for node in paths.nodes(model)
        if isinstance(module := innermost(node.module), QuantizedLinear)
    }
    parts: dict[str, np.ndarray] = {}
    for node, module in packed.values():
        for layer in node.members:
            name = checkpoint_key(model, found, f"{node.expanded(layer)}.kernel")
            kernel = module.quantized
            parts |= packed_tensors(kernel if layer is None else jax.tree.map(lambda a, i=layer: a[i], kernel), name)
    tensors |= {name: TensorInfo(part.shape, part.dtype) for name, part in parts.items()}
    for slot in slots(model, found):
        if slot.path[:-1] in packed and slot.path[-1] in packed[slot.path[:-1]][1].arrays:
            continue
        value = variables[slot.path].get_value()
        shape = value.shape[1:] if slot.stacked else value.shape
        shape = (*shape[:-2], shape[-1], shape[-2]) if slot.transpose else shape
        for layer, name in enumerate(slot.names):
            sources[name] = (slot, layer)
            tensors[name] = TensorInfo(tuple(shape), np.dtype(value.dtype))

    def read(name: str) -> np.ndarray:
        if name in parts:
            return parts[name]
        slot, layer = sources[name]
        value = variables[slot.path].get_value()
        array = np.asarray(value[layer] if slot.stacked else value)
        return np.swapaxes(array, -1, -2) if slot.transpose else array

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JpeftError(f"{folder}: cannot be made: {error.strerror or error}") from error
    write_safetensors(folder / WEIGHTS, tensors, read, {"format": "pt"})
    write_whole(folder / "config.json", [json.dumps(_config(model), indent=2, sort_keys=True).encode() + b"\n"])
    return folder


_WRAPPED = "save: the model has adapters that are not part of its weights; call jpeft.merge(model) first"


def _config(model: Model) -> dict[str, Any]:
    config, raw = model.config, model.config.raw
    found = family(config.model_type)
    raw["architectures"] = [name for name, task in found.architectures.items() if task == model.task][:1]
    for name in ("torch_dtype", "quantization_config", "num_labels", "classifier_pooling"):
        raw.pop(name, None)
    raw["dtype"] = _dtype(model)
    forms = {module.format for _, module in surgery.modules(model) if isinstance(module, QuantizedLinear)}
    if forms:
        raw["quantization_config"] = quantization_config(forms, raw["dtype"])
    raw["tie_word_embeddings"] = config.tie_word_embeddings
    if model.task in ("sequence-classification", "token-classification"):
        raw["id2label"] = {str(index): name for index, name in enumerate(config.labels)}
        raw["label2id"] = {name: index for index, name in enumerate(config.labels)}
    if model.pooling is not None:
        raw["classifier_pooling"] = model.pooling
    return raw


def _dtype(model: Model) -> str:
    sizes: dict[str, int] = {}
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        if jnp.issubdtype(value.dtype, jnp.floating):
            sizes[value.dtype.name] = sizes.get(value.dtype.name, 0) + value.size
    return max(sizes, key=lambda name: sizes[name])
