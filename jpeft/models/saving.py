"""Saving a model as a Hugging Face folder, with adapters merged on the way if wanted."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft import kinds, paths, surgery
from jpeft.errors import JpeftError
from jpeft.merge import merge
from jpeft.models.families import Slot, checkpoint_key, family, slots
from jpeft.models.model import Model
from jpeft.models.packed import packed_tensors, quantization_config
from jpeft.models.tensors import WEIGHTS, TensorInfo, write_safetensors, write_whole
from jpeft.quant import QuantizedLinear
from jpeft.stack import Stack
from jpeft.wrapper import Wrapper, innermost


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What rounding merged weights to their dtype changed.

    largest: the most by which any value differs from the float32 one. share: how much of the change that an adapter
    makes rounding amounts to, |rounded - exact| / |exact - base| in Frobenius norm, in the tensor of the file where
    that is most. tensor, dtype: that one and what it was rounded to; None where nothing was rounded.
    """

    largest: float = 0.0
    share: float = 0.0
    tensor: str | None = None
    dtype: str | None = None


def save(model: Model, folder: str | Path) -> Path:
    """Writes config.json and model.safetensors, which transformers loads to the same logits.

    Layers quantised as NF4, FP4 or Int8() are written as bitsandbytes has them.

    Every file appears whole or not at all, config.json last. `pooling="mean"` is written as `classifier_pooling`, which
    `load` reads; transformers' own classifiers pool in their own way whatever it says.

    Raises JpeftError for a model with wrappers in it (`save_merged` writes those) and for a folder that cannot be
    written.
    """
    _check(model, "save")
    wrappers = [path for path, module in surgery.modules(model) if isinstance(module, Wrapper)]
    if wrappers:
        at = [".".join(map(str, path)) for path in wrappers[:5]]
        raise JpeftError(
            "save: the model has adapters that are not part of its weights; call jpeft.merge(model) first, or "
            f"jpeft.models.save_merged ({len(wrappers)} wrappers, such as {at})"
        )
    return _write(model, model, Path(folder), lambda slot, layer: _value(model, slot.path, layer))


def save_merged(model: Model, folder: str | Path, *, dequantize: bool = False) -> Rounding:
    """Writes the tensors and the configuration of `save(merge(model, dequantize=dequantize), folder)`, streamed.

    No merged model is held: each weight is merged when it is its turn in the file, one layer at a time, in float32, and
    rounded once to its dtype. (`merge` rounds after each of several wrappers around a layer, and makes DoRA's norms in
    the layer's dtype.) Returns what that rounding changed.

    Raises JpeftError as `merge` and `save` do: for methods that are no function of a weight before anything is written;
    for a merged weight that is not finite when it is met, and then no file of weights is written.
    """
    _check(model, "save_merged")
    graphdef, state = nnx.split(model)
    merged = nnx.eval_shape(lambda state: merge(nnx.merge(graphdef, state), dequantize=dequantize), state)
    replaced = (Wrapper, kinds.Packed) if dequantize else (Wrapper,)
    rounding = Rounding()
    made: dict[Any, tuple[Any, Any]] = {}  # the last module that was folded: its tensors follow one another in the file

    def value(slot: Slot, layer: int | None) -> Any:
        nonlocal rounding
        start = _met(replaced, model, slot.path)
        if start is None:
            return _value(model, slot.path, layer)
        at, inside, name = slot.path[:start], slot.path[start:], slot.names[layer or 0]
        if (at, layer) not in made:
            made.clear()
            made[at, layer] = _folded(_layer(model, at, layer))
        folded, base = made[at, layer]
        exact, before = (_float32(part, inside) for part in (folded, base))
        assert exact is not None
        rounded = exact.astype(surgery.get(merged, slot.path).dtype)
        largest, lost, change = map(float, _differences(exact, rounded, before))
        if not math.isfinite(largest):
            raise JpeftError(
                f"save_merged: {name}: the merged weight is not finite in {rounded.dtype.name} (an overflow, or NaN in "
                "the adapter or base)"
            )
        share, most = lost / change if change else 0.0, max(largest, rounding.largest)
        rounding = dataclasses.replace(rounding, largest=most)
        if share > rounding.share:
            rounding = Rounding(most, share, name, rounded.dtype.name)
        return rounded

    _write(merged, model, Path(folder), value)
    return rounding


def _met(kind: tuple[type, ...], model: Model, path: surgery.Path) -> int | None:
    """After how many steps along `path` a module of that kind is met first, if there is one."""
    node: Any = model
    for taken, name in enumerate(path):
        if isinstance(node, kind):
            return taken
        node = surgery.child(node, name)
    return None


def _layer(model: Model, path: surgery.Path, layer: int | None) -> Any:
    """The module at `path`; of one inside a `Stack`, that of one layer."""
    module = surgery.get(model, path)
    for taken in range(len(path)):
        around = surgery.get(model, path[:taken])
        if isinstance(around, Stack) and layer is not None:
            return Stack(module, around.length).at(layer)
    return module


def _folded(module: Any) -> tuple[Any, Any]:
    """The wrapped or quantised `module` as a plain one in float32 whatever its dtype is, and the same without adapter.

    What cannot be folded is known by then.
    """

    def wide(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        return variable.replace(value.astype(jnp.float32)) if jnp.issubdtype(value.dtype, jnp.floating) else variable

    plain = surgery.rewrite(module, lambda part: part.plain() if isinstance(part, kinds.Packed) else part)
    plain = surgery.map_variables(plain, wide)
    bare = surgery.rewrite(plain, lambda part: part.base if isinstance(part, Wrapper) else part)
    return surgery.rewrite(plain, lambda part: part.fold(part.base) if isinstance(part, Wrapper) else part), bare


def _float32(module: Any, path: surgery.Path) -> jax.Array | None:
    """The variable at `path`; None where there is none, such as a bias that training added."""
    variable = dict(nnx.to_flat_state(nnx.state(module))).get(path)
    return None if variable is None else jnp.asarray(variable.get_value(), jnp.float32)


@jax.jit
def _differences(exact: jax.Array, rounded: jax.Array, before: jax.Array | None) -> tuple[jax.Array, ...]:
    """(largest |rounded - exact|, its Frobenius norm, that of what the adapter changed).

    Not in one program with the rounding: the compiler may take casting there and back for nothing at all.
    """
    lost, change = rounded.astype(jnp.float32) - exact, exact if before is None else exact - before
    return jnp.max(jnp.abs(lost), initial=0), jnp.linalg.norm(lost), jnp.linalg.norm(change)


def _value(model: Model, path: surgery.Path, layer: int | None) -> Any:
    value = surgery.get(model, path).get_value()
    return value if layer is None else value[layer]


def _check(model: Any, caller: str) -> None:
    if not isinstance(model, Model):
        found = type(model).__name__
        if isinstance(model, Wrapper):
            found += ", which stands around the model as a whole and is not part of its weights (jpeft.merge tells why)"
        raise JpeftError(f"{caller}: expected a model of jpeft.models, found {found}")


def _write(shapes: Model, model: Model, folder: Path, value: Callable[[Slot, int | None], Any]) -> Path:
    """Writes what `shapes` describes. value(slot, layer): a weight as it lies here; quantised ones are in `model`."""
    found = family(shapes.config.model_type)
    sources: dict[str, tuple[Slot, int | None]] = {}
    tensors: dict[str, TensorInfo] = {}
    packed = {node.path: node for node in paths.nodes(shapes) if isinstance(innermost(node.module), QuantizedLinear)}
    parts: dict[str, np.ndarray] = {}
    stored = {node.name: innermost(node.module) for node in paths.nodes(model)} if packed else {}
    for node in packed.values():
        kernel = stored[node.name].quantized
        for layer in node.members:
            name = checkpoint_key(shapes, found, f"{node.expanded(layer)}.kernel")
            parts |= packed_tensors(kernel if layer is None else jax.tree.map(lambda a, i=layer: a[i], kernel), name)
    tensors |= {name: TensorInfo(part.shape, part.dtype) for name, part in parts.items()}
    for slot in slots(shapes, found):
        if slot.path[:-1] in packed and slot.path[-1] in innermost(packed[slot.path[:-1]].module).arrays:
            continue
        variable = surgery.get(shapes, slot.path)
        shape = variable.shape[1:] if slot.stacked else variable.shape
        shape = (*shape[:-2], shape[-1], shape[-2]) if slot.transpose else shape
        for layer, name in enumerate(slot.names):
            sources[name] = (slot, layer if slot.stacked else None)
            tensors[name] = TensorInfo(tuple(shape), np.dtype(variable.dtype))

    def read(name: str) -> np.ndarray:
        if name in parts:
            return parts[name]
        slot, layer = sources[name]
        array = np.asarray(value(slot, layer))
        return np.swapaxes(array, -1, -2) if slot.transpose else array

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JpeftError(f"{folder}: cannot be made: {error.strerror or error}") from error
    write_safetensors(folder / WEIGHTS, tensors, read, {"format": "pt"})
    write_whole(folder / "config.json", [json.dumps(_config(shapes), indent=2, sort_keys=True).encode() + b"\n"])
    return folder


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
