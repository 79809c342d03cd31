"""Attention over the outputs of several frozen adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jpeft.dropout import Dropout
from jpeft.methods.bottleneck_wrappers import ACTIVATIONS, RowWise, Values
from jpeft.variables import AdapterBuffer, Trainable
from jpeft.wrapper import NotMergeable

# What is held of each adapter, and how many axes it has of its own.
NETWORK = {"down": 2, "down_bias": 1, "up": 2, "up_bias": 1, "scale": 0}
_ATTENTION = ("query", "query_bias", "key", "value")


def count_of(module: FusedAdapters) -> int:
    """How many adapters are fused there."""
    return module.scale.shape[module.leading]


class FusedAdapters(RowWise):
    """A module with N frozen adapters behind it, and trained attention over what they say.

        z_n = f_n(y),   p = softmax_n((y Q + b) (z_n K)),   y + sum_n p_n z_n V

    down [N, d, width], down_bias [N, width], up [N, width, d], up_bias [N, d], scale [N]: `AdapterBuffer`. query, key,
    value [d, d], query_bias [d]: `Trainable` in group "fusion". Inside a `Stack` all have the layer axis in front.
    """

    droppable = True
    off = "scale"

    def __init__(
        self,
        base: Any,
        *,
        name: str,
        network: Mapping[str, Array],
        attention: Mapping[str, Array],
        activation: str,
        dropout: float,
        regularization: float,
        layers: tuple[int, ...] | None,
    ):
        super().__init__(base, name=name, layers=layers)
        lead = network["scale"].shape[:-1]
        for own in NETWORK:
            setattr(self, own, AdapterBuffer(network[own]))
        for own in _ATTENTION:
            setattr(self, own, Trainable(attention[own], group="fusion"))
        self.own = (*NETWORK, *_ATTENTION)
        self.activation, self.regularization = activation, regularization
        self.leading = len(lead)
        self.dropout = Dropout(dropout, lead)

    def variable_axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {
            **dict.fromkeys(("query", "key", "value"), ("features", None)),
            "down": ("features", "width"),
            "down_bias": ("width",),
            "up": ("width", "features"),
            "up_bias": ("features",),
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        y = self.base(*args, **kwargs)
        made, weights = self.evaluated(self._fused, y)
        self.observed("attention", weights)
        return y + made

    def _fused(self, values: Values, y: Float[Array, "*batch d"]) -> tuple[Array, Array]:
        """What is added to y, and the weights [*batch, N], in float32."""
        typed = {name: value.astype(y.dtype) for name, value in values.items()}
        up, scale = typed["up"], typed["scale"]
        inner = jnp.einsum("...d,ndw->...nw", y, typed["down"]) + typed["down_bias"]
        inner = ACTIVATIONS[self.activation](inner) * scale[:, None]
        # What the adapters say, [*batch, N, d], is never formed: the key goes to the query's side, and from there into
        # the narrow space inside the networks. (A bias of the keys would shift all scores of a token alike, which the
        # softmax does not see.)
        asked = (y @ typed["query"] + typed["query_bias"]) @ typed["key"].T
        scores = jnp.sum(inner * jnp.einsum("...d,nwd->...nw", asked, up), axis=-1)
        scores = scores + (asked @ typed["up_bias"].T) * scale
        weights = jax.nn.softmax(scores.astype(jnp.float32))
        kept = self.dropout(weights).astype(y.dtype)
        mixed = jnp.einsum("...nw,nwd->...d", inner * kept[..., None], up) + (kept * scale) @ typed["up_bias"]
        return mixed @ typed["value"], weights

    def penalty(self) -> jax.Array:
        """regularization * |V - I|^2, summed over the layers (section 3.2 of the paper)."""
        value = self.value.get_value().astype(jnp.float32)
        return self.regularization * jnp.sum((value - jnp.eye(value.shape[-1])) ** 2)

    def keep(self, adapters: jax.Array) -> None:
        """Lets go of all adapters but these, by number."""
        for own in NETWORK:
            variable = vars(self)[own]
            variable.set_value(jnp.take(variable.get_value(), adapters, axis=self.leading))

    def fold(self, base: Any) -> Any:
        raise NotMergeable("attention over adapters is not a function of the weight it stands at")
