"""Variable types: what trains, what belongs to a task without training, and what is frozen.

| type            | gradient | saved with the adapter | examples                                  |
|-----------------|----------|------------------------|-------------------------------------------|
| `Trainable`     | yes      | yes                    | LoRA's A and B, a new head                |
| `AdapterBuffer` | no       | yes                    | scales, rank masks                        |
| `DropoutKey`    | no       | never                  | filled by `combine(..., dropout=key)`     |
| `AdapterIds`    | no       | never                  | filled by `combine(..., adapter_ids=ids)` |
| `Frozen`        | no       | no                     | every `nnx.Param` of the base             |
| `Quantized`     | no       | no                     | codes and scales of a quantised base      |
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from flax import nnx


class Trainable(nnx.Param):
    """A parameter that a method trains.

    Metadata: `group` labels it for the optimizer (`jpeft.param_labels`); `shared=True` means that it has no layer
    axis inside a `Stack`.
    """


class AdapterBuffer(nnx.Variable):
    """An array that belongs to a task, is saved and switched with it, and has no gradient."""


class DropoutKey(nnx.Variable):
    """A PRNG key with the layer axes of its module; `combine` fills it, nothing saves it."""


class AdapterIds(nnx.Variable):
    """Which of several adapters each row of the batch uses, [B]; `combine` fills it, nothing saves it."""


class Frozen(nnx.Variable):
    """A parameter of the base: not an `nnx.Param`, so no optimizer that asks for parameters finds it.

    Its metadata keeps the type it had, which `strip` and `merge` give back.
    """


class Quantized(nnx.Variable):
    """A part of a quantised weight (codes, scales): not an `nnx.Param`, whatever is done with the model."""


_ORIGINAL = "jpeft_original_type"


_V = TypeVar("_V", bound=nnx.Variable)


def retype(variable: nnx.Variable, kind: type[_V], **metadata: Any) -> _V:
    """`variable`'s array (not copied) and metadata under another Variable type.

    The constructor is not called: it would lay out the array anew where the metadata names a layout (`out_sharding`),
    which fails where no mesh is current, and run the hooks of a new variable a second time.
    """
    copied = variable.copy()
    return cast(_V, kind.from_metadata(copied.get_raw_value(), {**copied.get_metadata(), **metadata}))


def freeze(variable: nnx.Variable) -> nnx.Variable:
    """An `nnx.Param` that nothing trains becomes `Frozen`; everything else stays as it is."""
    if isinstance(variable, nnx.Param) and not isinstance(variable, Trainable):
        return retype(variable, Frozen, **{_ORIGINAL: type(variable)})
    return variable


def unfreeze(variable: nnx.Variable) -> nnx.Variable:
    """The inverse of `freeze`."""
    if not isinstance(variable, Frozen):
        return variable
    copied = variable.copy()
    metadata = copied.get_metadata()
    original = metadata.pop(_ORIGINAL)
    return cast(nnx.Variable, original.from_metadata(copied.get_raw_value(), metadata))
