"""Parts of UniPELT: an update of its own each, times a gate that their input opens and closes.

g(x) = sigmoid(x w + c), one number for every token
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.errors import JpeftError
from jpeft.methods.bottleneck_wrappers import RowWise, SerialAdapter, Values
from jpeft.methods.prefix_wrappers import PrefixWrapper
from jpeft.variables import AdapterBuffer, Trainable
from jpeft.wrapper import Wrapper, innermost


def opening(values: Values, x: Float[Array, "*batch in"]) -> Float[Array, "*batch"]:
    """The gate before its sigmoid, in float32."""
    return x.astype(jnp.float32) @ values["gate"].astype(jnp.float32) + values["gate_bias"].astype(jnp.float32)


class GatedSerialAdapter(SerialAdapter):
    """y + g(y) f(y). gate [out] and gate_bias []: `Trainable`, beside those of `Bottleneck`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        y = self.base(*args, **kwargs)
        gate = self.observed("gate", jax.nn.sigmoid(self.evaluated(opening, y)))
        return y + gate[..., None].astype(y.dtype) * self.change(y)


class GatedLowRank(RowWise):
    """base(x) + g(x) s x A B.

    a [in, r], b [r, out], gate [in], gate_bias []: `Trainable`; scale []: `AdapterBuffer`, alpha / r.
    """

    off = "scale"
    _GROUPS: ClassVar[dict[str, str]] = {"a": "lora_a", "b": "lora_b", "gate": "gate", "gate_bias": "gate"}

    def __init__(self, base: Any, *, name: str, values: Mapping[str, Array], layers: tuple[int, ...] | None):
        super().__init__(base, name=name, layers=layers)
        for own, group in self._GROUPS.items():
            setattr(self, own, Trainable(values[own], group=group))
        self.scale = AdapterBuffer(values["scale"])
        self.own = (*self._GROUPS, "scale")
        self.leading = values["scale"].ndim

    def variable_axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"a": ("in", None), "b": (None, "out")}

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        y = self.base(x, *args, **kwargs)
        x = x.astype(y.dtype)

        def change(values: Values, x: Array) -> Array:
            a, b, scale = (values[name].astype(x.dtype) for name in ("a", "b", "scale"))
            return ((x @ a) * scale) @ b

        gate = self.observed("gate", jax.nn.sigmoid(self.evaluated(opening, x)))
        return y + (gate[..., None].astype(y.dtype) * self.evaluated(change, x)).reshape(y.shape)


class PrefixGate(RowWise):
    """An attention module whose prefix of the same name is seen as far as the gate is open.

    Each query's attention weights of the prefix are multiplied by its g(x) before they are normalised: at 1 the whole
    prefix is seen, at 0 none of it. gate [in] and gate_bias []: `Trainable`.
    """

    def __init__(self, base: Any, *, name: str, values: Mapping[str, Array], layers: tuple[int, ...] | None):
        super().__init__(base, name=name, layers=layers)
        self.own = ("gate", "gate_bias")
        for own in self.own:
            setattr(self, own, Trainable(values[own], group="gate"))
        self.leading = values["gate_bias"].ndim

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        before = self.evaluated(opening, x)
        self.observed("gate", jax.nn.sigmoid(before))
        with self._prefix().weighted(jax.nn.log_sigmoid(before)):
            return self.base(x, *args, **kwargs)

    def _prefix(self) -> PrefixWrapper:
        found = innermost(self.base).attention_fn
        while isinstance(found, Wrapper):
            if isinstance(found, PrefixWrapper) and found.name == self.name:
                return found
            found = found.base
        raise JpeftError(f"the attention under the gate {self.name!r} has no prefix of that name")
