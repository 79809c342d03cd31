"""The bottleneck network of adapters, and the ways in which it stands at a module.

f(x) = s (act(x W_down + b_down) W_up + b_up)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jpeft.dropout import Dropout, LayerDropout
from jpeft.variables import AdapterBuffer, Trainable
from jpeft.wrapper import NotMergeable, Wrapper, of_tasks

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "swish": jax.nn.silu,
    "silu": jax.nn.silu,
    "leaky_relu": jax.nn.leaky_relu,
    "tanh": jnp.tanh,
}

Values = Mapping[str, Array]


def start(init: str, key: jax.Array, inputs: int, width: int, outputs: int) -> dict[str, Array]:
    """Initial values of one bottleneck network, in float32.

    "lora": W_down uniform within 1 / sqrt(inputs), W_up zero. "houlsby": both normal with standard deviation 0.01, cut
    at two of them. "bert": both normal with 0.02. Biases are zero.
    """
    first, second = jax.random.split(key)

    def drawn(key: jax.Array, shape: tuple[int, int]) -> Array:
        if init == "houlsby":
            return 0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape)
        return 0.02 * jax.random.normal(key, shape)

    if init == "lora":
        down = jax.random.uniform(first, (inputs, width), minval=-1.0, maxval=1.0) / math.sqrt(inputs)
        up = jnp.zeros((width, outputs))
    else:
        down, up = drawn(first, (inputs, width)), drawn(second, (width, outputs))
    return {"down": down, "down_bias": jnp.zeros((width,)), "up": up, "up_bias": jnp.zeros((outputs,))}


class RowWise(Wrapper):
    """A wrapper whose variables `own` are used by one function of them, so that each row may use another task's."""

    takes_many = True
    own: tuple[str, ...] = ()
    off: ClassVar[str | None] = None  # the variable that is 0 in rows which use no task

    def evaluated(self, function: Callable[..., Any], *arrays: Array) -> Any:
        """function(values, *arrays), values being `own` by name; with several tasks, row by row of the arrays."""
        values = {name: vars(self)[name][...] for name in self.own}
        if self.adapter_ids is None:
            return function(values, *arrays)
        ids = self.tasks_of(arrays[0])
        # Gathered here, inside the scan over layers: the base's products stay products over the whole batch.
        chosen = {name: of_tasks(value, ids) for name, value in values.items()}
        if self.off is not None:
            scale = chosen[self.off]
            chosen[self.off] = jnp.where((ids < 0).reshape(-1, *(1,) * (scale.ndim - 1)), 0, scale)

        def one(values: Values, *row: Array) -> Any:
            return jax.tree.map(lambda made: made[0], function(values, *(array[None] for array in row)))

        return jax.vmap(one)(chosen, *arrays)


class Bottleneck(RowWise):
    """A module with a bottleneck network; subclasses say from what to what it leads.

    down [in, width], down_bias [width], up [width, out], up_bias [out]: `Trainable`. scale []: `Trainable` if learned,
    otherwise an `AdapterBuffer`. depth [], with `drop`: the number of the layer, an `AdapterBuffer`. Inside a `Stack`
    all have the layer axis in front.

    drop: so many lower layers at most go without in a training step (`jpeft.methods.adapter_drop`).
    """

    droppable = True
    off = "scale"

    def __init__(
        self,
        base: Any,
        *,
        name: str,
        values: Mapping[str, jax.Array],
        learned: bool,
        activation: str,
        dropout: float,
        drop: int,
        depth: np.ndarray,
        layers: tuple[int, ...] | None,
    ):
        super().__init__(base, name=name, layers=layers)
        lead = values["scale"].shape
        for own, value in values.items():
            if own == "scale" and not learned:
                self.scale: Any = AdapterBuffer(value)
            else:
                setattr(self, own, Trainable(value, group="adapter"))
        self.own = tuple(values)
        self.activation = activation
        self.leading = len(lead)
        self.dropout = Dropout(dropout, lead)
        if drop:
            self.depth = AdapterBuffer(jnp.asarray(depth, jnp.int32))
            self.own += ("depth",)
            self.layer_dropout = LayerDropout(drop, lead)
        self.drop = drop

    def variable_axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {
            "down": ("features", "width"),
            "down_bias": ("width",),
            "up": ("width", "features"),
            "up_bias": ("features",),
        }

    def change(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """f(x), in x's dtype."""
        return self.evaluated(self._network, x)

    def _network(self, values: Values, x: Array) -> Array:
        scale = values["scale"]
        if self.drop:
            scale = scale * self.layer_dropout(values["depth"])
        typed = {name: value.astype(x.dtype) for name, value in values.items() if name not in ("depth", "scale")}
        inner = ACTIVATIONS[self.activation](x @ typed["down"] + typed["down_bias"])
        outer = self.dropout(inner) @ typed["up"] + typed["up_bias"]
        return outer * scale.astype(x.dtype)

    def fold(self, base: nnx.Module) -> nnx.Module:
        raise NotMergeable("a network with an activation is not a function of the weight it stands at")


class SerialAdapter(Bottleneck):
    """Behind the module: y + f(y)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        y = self.base(*args, **kwargs)
        return y + self.change(y)


class ParallelAdapterWrapper(Bottleneck):
    """Beside the module: base(x) + f(x)."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        y = self.base(x, *args, **kwargs)
        return y + self.change(x.astype(y.dtype))


class ParallelAdapterOnResidual(Bottleneck):
    """Beside a sublayer that only its last module closes: base(y, x + f(x)), where base adds its second argument."""

    def __call__(self, y: Array, x: Array, *args: Any, **kwargs: Any) -> Array:
        return self.base(y, x + self.change(x), *args, **kwargs)
