"""DoRA: a weight's columns keep a direction of their own and get a trained length. Liu et al. 2024, arXiv:2402.09353.

    y = m / n * (x (W + s A B)),   n the lengths of the columns of W + s A B, taken as constants in the gradient

m starts as the lengths of W's columns, so the adapted model starts as the base. The sum W + s A B is never formed:
n^2 is |W|^2 + 2 s <W' A, B'> + s^2 |A B|^2, whose parts are products with small factors; |W|^2 is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jpeft import kinds
from jpeft.errors import JpeftError
from jpeft.methods.lora import LoRA
from jpeft.methods.low_rank import LoRALinear, LoRALinearGeneral, LoRAWrapper
from jpeft.variables import AdapterBuffer, Trainable
from jpeft.wrapper import Wrapper, innermost


class DoRAWrapper(LoRAWrapper):
    """A linear layer with an update and trained lengths; subclasses say how for one kind of layer.

    m: `Trainable`, lead + [*out]. squares: `AdapterBuffer`, likewise: the squared lengths of the base's columns.
    """

    takes_many = False
    keeps_weight = True

    def __init__(self, base: Any, **settings: Any):
        super().__init__(base, **settings)
        if isinstance(base, Wrapper):
            raise JpeftError(
                f"DoRA takes the lengths of the layer's own columns and cannot stand around another adapter "
                f"({base.name!r}); apply DoRA first"
            )
        weight = kinds.dense_weight(base, self.layers)
        features = self.shapes(1)[1][1:]
        axes = tuple(range(self.leading, weight.ndim - len(features)))
        squares = jnp.sum(weight**2, axis=axes)
        self.squares = AdapterBuffer(squares)
        self.m = Trainable(jnp.sqrt(squares), group="dora_m")

    def variable_axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {**super().variable_axes(), "m": ("out",), "squares": ("out",)}

    def column_gain(self) -> Float[Array, "*lead out"]:
        """m / n, in float32."""
        a, b, scale = (jax.lax.stop_gradient(factor.astype(jnp.float32)) for factor in self.factors())
        lead, rank = scale.shape[:-1], scale.shape[-1]
        a, b = a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1) * scale[..., :, None]
        # A stored weight multiplies as it is; only a quantised one is made dense for this.
        packed = isinstance(innermost(self.base), kinds.Packed)
        weight = kinds.dense_weight(self.base, self._outside()) if packed else self._weight()
        weight = weight.reshape(*lead, a.shape[-2], -1)
        across = jnp.einsum("...io,...ir->...ro", weight, a.astype(weight.dtype), preferred_element_type=jnp.float32)
        inner = jnp.einsum("...ir,...is->...rs", a, a, precision=jax.lax.Precision.HIGHEST)
        update = jnp.sum(b * jnp.einsum("...rs,...so->...ro", inner, b, precision=jax.lax.Precision.HIGHEST), axis=-2)
        squares = self.squares[...].reshape(*lead, -1) + 2 * jnp.sum(across * b, axis=-2) + update
        length = jnp.sqrt(jnp.maximum(squares, 1e-24))
        return self.m[...] / length.reshape(self.m.shape)

    def _outside(self) -> tuple[int, ...] | None:
        """The covered layers, where the base has all of them: outside of the stack's scan."""
        stacked = bool(kinds.lead(self.base))
        return self.layers if stacked else None

    def _weight(self) -> Array:
        value, layers = kinds.weight(self.base).get_value(), self._outside()
        return value if layers is None else value[jnp.array(layers)]

    def _together(self, y: Array, plain: Array | None, update: Array) -> Array:
        """y, the base's output, with `update` and the gain; plain: the base's output of the input under dropout."""
        gain = self.column_gain().astype(y.dtype)
        bias = getattr(self.base, "bias", None)  # that of BitFit, if it trains one
        shift = 0 if bias is None else bias[...].astype(y.dtype)
        if plain is None:  # one product with the gain, so that one array of the output's size is kept for its gradient
            return gain * (y - shift + update) + shift
        return y + (gain - 1) * (plain - shift) + gain * update


class DoRALinear(DoRAWrapper, LoRALinear):
    """On `nnx.Linear`."""

    def __call__(self, x: Float[Array, "*batch in"], *args: Any, **kwargs: Any) -> Float[Array, "*batch out"]:
        y = self.base(x, *args, **kwargs)
        dropped = self.dropout(x.astype(y.dtype))
        plain = self.base(dropped, *args, **kwargs) if self.dropout.active and self.dropout.rate else None
        return self._together(y, plain, self.update(dropped, *self.factors_in(y.dtype)))


class DoRALinearGeneral(DoRAWrapper, LoRALinearGeneral):
    """On `nnx.LinearGeneral`."""

    def __call__(self, x: Float[Array, "..."], *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        y = self.base(x, *args, **kwargs)
        dropped = self.dropout(x.astype(y.dtype))
        plain = self.base(dropped, *args, **kwargs) if self.dropout.active and self.dropout.rate else None
        return self._together(
            y, plain, self.update(self.contracted(dropped), *self.factors_in(y.dtype)).reshape(y.shape)
        )


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA (arXiv:2402.09353) on linear layers; the fields are LoRA's.

    With dropout the base's product is computed a second time, of the input under dropout, as in the peer's code.
    The lengths are those of the layer's own weight, so DoRA comes before other methods on the same layer. name:
    `<module path>/<name>/a`, `/b` and `/m`.
    """

    kind: ClassVar[str] = "dora"
    forms: ClassVar[dict[type[nnx.Module], type[LoRAWrapper]]] = {
        nnx.Linear: DoRALinear,
        nnx.LinearGeneral: DoRALinearGeneral,
    }
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = tuple(forms)

    name: str = "dora"
