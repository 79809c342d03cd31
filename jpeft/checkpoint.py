"""Adapters on disk, through Orbax: written whole or not at all, and refused when they do not belong to the base.

A saved adapter is an Orbax checkpoint with two parts, `adapter` (what trained) and `buffers` (scales and masks). Its
metadata, plain JSON in `_CHECKPOINT_METADATA`, holds the methods' configurations and what identifies the base: shape
and dtype of each of its arrays, a few of its values, and how its layers are quantised. It loads onto any mesh and any
number of devices.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jpeft import expressions, kinds, paths
from jpeft.errors import JpeftError
from jpeft.merge import strip
from jpeft.methods import Method, applied, compose, from_dict
from jpeft.methods.method import warn_if_unfinished
from jpeft.partition import Arrays, combine, partition, value_of, variables
from jpeft.targets import lasting
from jpeft.variables import Frozen, Quantized, Trainable
from jpeft.wrapper import innermost

FORMAT = "jpeft-adapter"
VERSION = 1

_SAMPLES = 8  # values of each base array that are remembered
# bfloat16 keeps 8 bits: a base cast to it is still the same base.
_SAMPLE_TOLERANCE = 2.0**-7
_MOST_DIFFERENCES = 12
_MOST_METHODS = 64  # of one adapter; each takes a walk over the model
# Settings of methods that name modules, by expressions or otherwise.
_SELECTING = ("targets", "exclude", "norms", "feed_forward", "rank_pattern", "alpha_pattern", "bottleneck_pattern")
_LONGEST_NAME = 200  # Orbax adds to a folder's name while it writes


def save_adapter(path: str | Path, model: nnx.Module, *, overwrite: bool = False) -> Path:
    """Writes the adapter of `model` (trainable arrays and buffers, with the methods' configurations) to folder `path`.

    Every process of a multi-process run calls this. overwrite: replace an adapter that jpeft saved there before, once
    the new one is written; nothing else is ever replaced. What is neither trained nor a buffer, such as batch
    statistics, is not saved.

    Raises JpeftError if there is nothing to save, if `load_adapter` could not make the model again, or if `path`
    exists.
    """
    from orbax.checkpoint import v1 as ocp

    path = _folder(path, "save_adapter")
    _, adapter, buffers, _ = partition(model)
    if not adapter:
        raise JpeftError(f"save_adapter({str(path)!r}): the model has nothing trainable; apply a method first")
    if any(isinstance(array, jax.ShapeDtypeStruct) for array in adapter.values()):
        raise JpeftError(f"save_adapter({str(path)!r}): the model is abstract; there are no arrays to save")
    _check_remade(model, adapter, buffers)
    for method in applied(model):
        _check_entries(method)  # what could not be loaded again
    warn_if_unfinished(model, "save_adapter")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "methods": [method.to_dict() for method in applied(model)],
        "base": fingerprint(model),
        "quantization": _quantization(model),
    }
    if path.exists():
        if not overwrite:
            raise JpeftError(f"save_adapter: {str(path)!r} exists; choose another folder or pass overwrite=True")
        read_metadata(path, "save_adapter")  # refuses what is no adapter
    new = path.with_name(f"{path.name}.new") if path.exists() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ocp.save_checkpointables(new, _parts(adapter, buffers), overwrite=new != path, custom_metadata=metadata)
        if new != path:
            _swap(new, path)
    except Exception as error:  # Orbax and TensorStore raise many kinds, of a full disk for one
        if jax.process_count() == 1:
            shutil.rmtree(f"{new}.orbax-checkpoint-tmp", ignore_errors=True)
            if new != path:
                shutil.rmtree(new, ignore_errors=True)
        raise JpeftError(f"save_adapter: cannot write {str(path)!r}: {error}") from error
    return path


def _swap(new: Path, path: Path) -> None:
    """Puts `new` in the place of `path`, by one process of several."""
    from jax.experimental import multihost_utils

    if jax.process_index() == 0:
        old = path.with_name(f"{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jpeft.save_adapter")


def _folder(path: str | Path, caller: str) -> Path:
    """`path` as an absolute local path. Raises JpeftError for what can be none."""
    try:
        made = Path(path).expanduser().absolute()
        too_long = len(os.fsencode(made.name)) > _LONGEST_NAME
    except (TypeError, ValueError, RuntimeError) as error:
        shown = repr(path) if isinstance(path, str | Path) else f"a {type(path).__name__}"
        raise JpeftError(f"{caller}: {shown} is no path: {error}") from None
    if "://" in str(path) or "\0" in str(path) or too_long:
        raise JpeftError(f"{caller}: {path!r} cannot be used; give a folder of this machine or a mounted bucket")
    return made


def _check_remade(model: Any, adapter: Arrays, buffers: Arrays) -> None:
    """Raises JpeftError if the recorded methods do not make this model from its base."""
    remade = partition(_apply_abstract(applied(model), strip(model)))
    made, wanted = ({k: v.shape for k, v in {**a, **b}.items()} for a, b in (remade[1:3], (adapter, buffers)))
    if made != wanted:
        odd = sorted(key for key in made.keys() | wanted.keys() if made.get(key) != wanted.get(key))
        raise JpeftError(
            f"save_adapter: applying {list(applied(model))} to the base does not give this model ({odd[:4]} differ); "
            "apply methods to the whole model, not to a part of it"
        )


def load_adapter(path: str | Path, base_model: Any, *, check_base: bool = True) -> Any:
    """`base_model` with the adapter saved at `path`: the methods are applied again and their arrays restored.

    Raises JpeftError, with all differences listed, if `path` is no adapter, was written by a newer version, names an
    unknown method, or was trained on another base. check_base=False accepts a base with other values of the same
    shapes.
    """
    from orbax.checkpoint import v1 as ocp

    path = _folder(path, "load_adapter")
    metadata = read_metadata(path)
    methods = _methods(path, metadata["methods"])
    frozen = partition(base_model).frozen
    differences = _compare_quantization(metadata["quantization"], _quantization(base_model))
    differences = differences or _compare_base(metadata["base"], base_model, values=check_base)
    if differences:
        _refuse(path, "was trained on another base", differences)

    try:
        adapted = _apply_abstract(methods, base_model)
    except JpeftError as error:
        raise JpeftError(f"load_adapter: {str(path)!r} does not fit this model: {error}") from error
    graphdef, adapter, buffers, _ = partition(adapted)
    wanted = _parts(adapter, buffers)
    differences = _compare_arrays(_on_disk(path), wanted)
    if differences:
        _refuse(path, "does not fit this model", differences)
    sharding = sharding_of(frozen)
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), wanted)
    try:
        loaded = ocp.load_checkpointables(path, target)
    except Exception as error:  # Orbax and TensorStore raise many kinds; all of them mean a damaged checkpoint
        raise JpeftError(f"load_adapter: the arrays of {str(path)!r} cannot be read: {error}") from error
    return combine(graphdef, loaded["adapter"], loaded.get("buffers", {}), frozen)


def read_adapter(path: str | Path, base_model: Any) -> tuple[tuple[Method, ...], Arrays]:
    """The methods and the arrays (adapter and buffers) saved at `path`, by key, for a part of them to be used.

    Raises JpeftError as `load_adapter` does, if it is none or was trained on another base than `base_model`.
    """
    from orbax.checkpoint import v1 as ocp

    path = _folder(path, "read_adapter")
    metadata = read_metadata(path, "read_adapter")
    methods = _methods(path, metadata["methods"])
    differences = _compare_quantization(metadata["quantization"], _quantization(base_model))
    differences = differences or _compare_base(metadata["base"], base_model, values=True)
    if differences:
        _refuse(path, "was trained on another base", differences)
    sharding = sharding_of(partition(base_model).frozen)
    target = {
        part: {key: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for key, a in arrays.items()}
        for part, arrays in _on_disk(path).items()
    }
    try:
        loaded = ocp.load_checkpointables(path, target)
    except Exception as error:  # see load_adapter
        raise JpeftError(f"read_adapter: the arrays of {str(path)!r} cannot be read: {error}") from error
    return methods, {**loaded["adapter"], **loaded.get("buffers", {})}


def read_metadata(path: Path, caller: str = "load_adapter") -> dict[str, Any]:
    """The JSON beside the arrays of a saved adapter. Raises JpeftError if `path` is not one."""
    if not path.is_dir():
        raise JpeftError(f"{caller}: there is no folder {str(path)!r}")
    file = path / "_CHECKPOINT_METADATA"
    try:
        metadata = json.loads(file.read_text(encoding="utf-8")).get("custom_metadata")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise JpeftError(f"{caller}: {str(path)!r} is no complete jpeft adapter: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise JpeftError(f"{caller}: {str(path)!r} is an Orbax checkpoint, but not an adapter that jpeft saved")
    version = metadata.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise JpeftError(
            f"load_adapter: {str(path)!r} has format version {version!r}; this jpeft reads up to {VERSION}: upgrade it"
        )
    return _validated(path, metadata)


def _validated(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    import pydantic

    class BaseArray(pydantic.BaseModel):
        shape: list[int]
        dtype: str
        values: list[float | None] = pydantic.Field(min_length=_SAMPLES, max_length=_SAMPLES)

    class Metadata(pydantic.BaseModel):
        methods: list[dict[str, Any]]
        base: dict[str, BaseArray]
        quantization: dict[str, dict[str, Any]] = {}

    try:
        return Metadata.model_validate(metadata, strict=True).model_dump()
    except pydantic.ValidationError as error:
        raise JpeftError(f"load_adapter: the description in {str(path)!r} cannot be used: {error}") from error


def _methods(path: Path, configs: list[dict[str, Any]]) -> tuple[Method, ...]:
    try:
        if len(configs) > _MOST_METHODS:
            raise JpeftError(f"it has {len(configs)} methods, more than {_MOST_METHODS}")
        methods = tuple(from_dict(config) for config in configs)
        for method in methods:
            _check_entries(method)
        return methods
    except (JpeftError, TypeError, ValueError, OverflowError) as error:
        raise JpeftError(f"load_adapter: the configuration in {str(path)!r} cannot be used: {error}") from error


def _check_entries(method: Method) -> None:
    """Raises JpeftError for a regular expression among the settings of `method` that could run too long."""
    for field in dataclasses.fields(method):
        given = getattr(method, field.name)
        if field.name in _SELECTING and given is not None:
            for entry in given:
                if isinstance(entry, str) and not lasting(entry):
                    expressions.compiled(entry, f"{type(method).__name__}, {field.name}")


def _apply_abstract(methods: tuple[Method, ...], base_model: Any) -> Any:
    if not methods:  # a head alone was trained
        return nnx.eval_shape(lambda: nnx.clone(base_model))
    return nnx.eval_shape(lambda: compose(*methods)(base_model, rngs=0))


def _parts(adapter: Arrays, buffers: Arrays) -> dict[str, Arrays]:
    return {"adapter": adapter, **({"buffers": buffers} if buffers else {})}  # Orbax takes no empty tree


def _on_disk(path: Path) -> dict[str, dict[str, Any]]:
    from orbax.checkpoint import v1 as ocp

    try:
        parts = ocp.checkpointables_metadata(path).metadata
        return {name: dict(parts[name]) for name in ("adapter", "buffers") if name in parts}
    except Exception as error:  # see load_adapter
        raise JpeftError(f"load_adapter: {str(path)!r} is damaged: {error}") from error


def _compare_arrays(found: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Arrays]) -> list[str]:
    said = []
    for part in sorted({*found, *wanted}):
        here, there = wanted.get(part, {}), found.get(part, {})
        said += [f"{part} {key!r} is missing in the file" for key in here if key not in there]
        said += [f"{part} {key!r} has no place in the model" for key in there if key not in here]
        for key in here.keys() & there.keys():
            ours, theirs = tuple(here[key].shape), tuple(there[key].shape)
            if ours != theirs:
                said.append(f"{part} {key!r} has shape {theirs} in the file and {ours} in the model")
    return said


def _refuse(path: Path, why: str, differences: list[str]) -> None:
    shown = differences[:_MOST_DIFFERENCES]
    more = len(differences) - len(shown)
    lines = "\n  - ".join([*shown, *([f"and {more} more"] if more else [])])
    raise JpeftError(f"load_adapter: the adapter in {str(path)!r} {why}:\n  - {lines}")


def sharding_of(frozen: Arrays) -> Any:
    """Where an adapter's arrays go: replicated over the base's mesh, or on the base's device."""
    shardings = [array.sharding for array in frozen.values() if isinstance(array, jax.Array)]
    for sharding in shardings:
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
    device = next(iter(shardings[0].device_set)) if shardings else jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device)


def _quantization(model: Any) -> dict[str, dict[str, Any]]:
    """How each packed layer of the base is stored, by canonical path."""
    inner = {node.name: innermost(node.module) for node in paths.nodes(model)}
    return {name: module.storage() for name, module in inner.items() if isinstance(module, kinds.Packed)}


def _compare_quantization(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    different: dict[tuple[str, str], list[str]] = {}
    for name in {**saved, **present}:
        then, now = (said.get(name) for said in (saved, present))
        if then != now:
            words = tuple("not quantised" if one is None else f"quantised as {one}" for one in (then, now))
            different.setdefault((words[0], words[1]), []).append(name)
    said = []
    for (then, now), names in different.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        said.append(f"{', '.join(map(repr, names[:3]))}{more} of the base it was trained on: {then}; here: {now}")
    return said


def fingerprint(model: Any) -> dict[str, Any]:
    """Shape, dtype and a few values of each parameter of the base: what it is recognised by."""
    return {
        key: {"shape": list(array.shape), "dtype": str(array.dtype), "values": values}
        for key, array, values in _samples(model)
    }


def _samples(model: Any) -> list[tuple[str, Any, list[float | None]]]:
    """A few values of each floating-point or quantised parameter that does not train; None for what is not finite.

    State that is no parameter, such as batch statistics and caches, changes in use and identifies nothing.
    """
    floats = {
        key: value_of(variable)
        for key, _, variable in variables(model)
        if isinstance(variable, Quantized)
        or (
            isinstance(variable, Frozen | nnx.Param)
            and not isinstance(variable, Trainable)
            and jnp.issubdtype(variable.dtype, jnp.floating)
        )
    }
    concrete = {key: array for key, array in floats.items() if not isinstance(array, jax.ShapeDtypeStruct)}
    meshes = [a.sharding.mesh for a in concrete.values() if isinstance(getattr(a, "sharding", None), NamedSharding)]

    def pick(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {key: _picked(array).astype(jnp.float32) for key, array in arrays.items()}

    # Replicated, so that each process of several holds all values.
    out = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    picked = jax.device_get(jax.jit(pick, out_shardings=out)(concrete)) if concrete else {}
    return [
        (key, array, [float(v) if math.isfinite(v) else None for v in picked.get(key, ())])
        for key, array in floats.items()
    ]


def _picked(array: jax.Array) -> jax.Array:
    places = _places(array.shape)
    if any(kind == AxisType.Explicit for kind in jax.typeof(array).sharding.mesh.axis_types):
        return array.at[places].get(out_sharding=PartitionSpec())
    return array[places]


def _places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    size = math.prod(shape)
    # Not evenly spread: a stride that divides the row length would look at a single column.
    flat = (np.arange(_SAMPLES, dtype=np.int64) * (size // _SAMPLES + 1) + size // 3) % max(size, 1)
    return np.unravel_index(flat, shape) if shape else ()


def _compare_base(saved: Mapping[str, Any], model: Any, *, values: bool) -> list[str]:
    said = []
    present = {key: (array, sample) for key, array, sample in _samples(model)}
    said += [f"the base has no array {key!r}" for key in saved if key not in present]
    said += [f"the base has an array {key!r} that was not there" for key in present if key not in saved]
    for key in [key for key in saved if key in present]:
        array, sample = present[key]
        was = saved[key]
        if list(was["shape"]) != list(array.shape):
            said.append(f"{key!r} had shape {tuple(was['shape'])} and has {tuple(array.shape)}")
        elif values and sample and was["values"]:
            then, now = (np.array(values, dtype=np.float64) for values in (was["values"], sample))  # None becomes NaN
            largest = max(float(np.nanmax(np.abs([*then, 0.0]))), 1e-30)
            if not np.allclose(then, now, rtol=0, atol=_SAMPLE_TOLERANCE * largest, equal_nan=True):
                said.append(f"the values of {key!r} differ (a few compared: {then[0]:.4g} then, {now[0]:.4g} now)")
    return said
