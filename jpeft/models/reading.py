"""Variables filled from a source of tensors: as a whole, or on a mesh only the slices that this process owns.

Safetensors are mapped, so a slice of a tensor reads the bytes of the slice. Slices that several devices hold are read
once. What has to be quantised is read tensor by tensor, because double quantisation takes the mean over the whole
tensor; of each, only the owned slices of codes and scales are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.models.families import Slot
from jpeft.models.packed import formats_of
from jpeft.models.tensors import TensorSource
from jpeft.quant import Format, QuantizedKernel
from jpeft.quant.linear import in_place_of
from jpeft.sharding import Rules, specs, tell

Index: TypeAlias = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each variable of a model goes: on `mesh`, by its path in the NNX state, or with None as JAX has it."""

    mesh: Mesh | None = None
    where: Mapping[surgery.Path, PartitionSpec] = dataclasses.field(default_factory=dict)

    def at(self, path: surgery.Path) -> NamedSharding | None:
        """The sharding of the variable at `path`."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.where[path])

    def tell(self, model: nnx.Module) -> None:
        """Tells the modules that want to know, as `jpeft.shard` does."""
        if self.mesh is not None:
            tell(model, self.mesh, self.where)


def plan(
    model: nnx.Module, packing: Mapping[surgery.Path, Format], dtype: Any, mesh: Mesh | None, rules: Rules | None
) -> Placement:
    """The placement of an abstract model of which the linear layers in `packing` will be quantised."""
    if mesh is None:
        if rules is not None:
            raise JpeftError("rules say how weights lie on a mesh; give mesh= too (jpeft.make_mesh makes one)")
        return Placement()

    def packed(form: Format, linear: Any) -> Any:
        weight = jax.ShapeDtypeStruct(linear.kernel.get_value().shape, dtype)
        return in_place_of(linear, jax.eval_shape(form.quantize, weight), form.compute_dtype)

    if packing:
        model = surgery.replace(model, {at: functools.partial(packed, form) for at, form in packing.items()})
    return Placement(mesh, specs(model, mesh, rules))


def placed(shape: tuple[int, ...], at: NamedSharding | None, part: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array of which `part(index)` gives a slice; each slice is asked for once."""
    if at is None:
        return jnp.asarray(part((slice(None),) * len(shape)))
    made: dict[Any, np.ndarray] = {}

    def once(index: Any) -> np.ndarray:
        key = _key(index, shape)
        if key not in made:
            made[key] = part(index)
        return made[key]

    return jax.make_array_from_callback(shape, at, once)


def read(
    source: TensorSource, slot: Slot, names: list[str], shape: tuple[int, ...], dtype: Any, at: NamedSharding | None
) -> jax.Array:
    """One variable from the tensors `names`, one for each layer if it is stacked."""

    def part(index: Index) -> np.ndarray:
        made = np.empty(_extent(index, shape), dtype)
        own = index[1:] if slot.stacked else index
        chosen = names[index[0]] if slot.stacked else names
        for row, name in zip(made if slot.stacked else [made], chosen, strict=True):
            tensor = source.read(name)
            row[...] = (np.swapaxes(tensor, -1, -2) if slot.transpose else tensor)[own]
        return made

    return placed(shape, at, part)


def read_packed(
    source: Any, slot: Slot, names: list[str], form: Format, dtype: Any, placement: Placement
) -> QuantizedKernel:
    """One quantised kernel, tensor by tensor: kept as stored, or quantised from `dtype`."""
    lead = (len(names),) if slot.stacked else ()
    shapes: dict[str, tuple[int, ...]] = {}
    owned: dict[str, dict[Any, tuple[Index, np.ndarray]]] = {}
    for layer, name in enumerate(names):
        if formats_of(source).get(name) == form:
            kernel = source.read_packed(name)
        else:
            tensor = source.read(name).astype(dtype)
            try:
                kernel = form.quantize(np.swapaxes(tensor, -1, -2) if slot.transpose else tensor)
            except JpeftError as error:
                raise JpeftError(f"{source.where}: {name!r}: {error}") from None
        for key, array in kernel.arrays.items():
            if key not in owned:
                shapes[key] = (*lead, *array.shape)
                owned[key] = _buffers(shapes[key], array.dtype, placement.at((*slot.path[:-1], key)))
            for index, rows in owned[key].values():
                rows[(layer,) if slot.stacked else ...] = np.asarray(array)[index[len(lead) :]]
    arrays = {
        key: placed(
            shape,
            placement.at((*slot.path[:-1], key)),
            lambda index, key=key, shape=shape: owned[key][_key(index, shape)][1],  # type: ignore[misc]
        )
        for key, shape in shapes.items()
    }
    return QuantizedKernel(arrays, form.bare(), kernel.shape, jnp.dtype(dtype).name)


def _buffers(shape: tuple[int, ...], dtype: Any, at: NamedSharding | None) -> dict[Any, tuple[Index, np.ndarray]]:
    """Room for each slice of an array that this process owns. No rule cuts layer axes."""
    whole = (slice(None),) * len(shape)
    indices: Any = [whole] if at is None else at.addressable_devices_indices_map(shape).values()
    distinct = {_key(index, shape): index for index in indices}
    return {key: (index, np.empty(_extent(index, shape), dtype)) for key, index in distinct.items()}


def _key(index: Index, shape: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(cut.indices(size) for cut, size in zip(index, shape, strict=True))


def _extent(index: Index, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*cut)) for cut in _key(index, shape))
