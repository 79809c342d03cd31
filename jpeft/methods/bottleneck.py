"""Bottleneck adapters: small networks with an activation, behind or beside the sublayers of a frozen model.

    Houlsby           y + f(y) behind attention and feed-forward    Houlsby et al. 2019, arXiv:1902.00751
    Pfeiffer          y + f(y) behind the feed-forward              Pfeiffer et al. 2021, arXiv:2005.00247
    ParallelAdapter   FFN(x) + s f(x)                               He et al. 2022, arXiv:2110.04366

with f(x) = act(x W_down + b_down) W_up + b_up. y is the sublayer's output before the residual sum, so in post-norm
models the norm comes behind the adapter, and in pre-norm models before the sublayer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.bottleneck_wrappers import (
    ACTIVATIONS,
    Bottleneck,
    ParallelAdapterOnResidual,
    ParallelAdapterWrapper,
    SerialAdapter,
    start,
)
from jpeft.methods.method import Method
from jpeft.methods.retrained import NormTuning
from jpeft.methods.targeted import Targeted, lead_of, replaced, targets_or_none
from jpeft.paths import Node
from jpeft.targets import Layers, Pattern, lasting
from jpeft.wrapper import innermost


class _Bottlenecks(Targeted):
    """What the methods of this page share: the fields of the network, and its initial values."""

    wraps: ClassVar[tuple[type[nnx.Module], ...]] = (nnx.Module,)

    reduction_factor: float
    bottleneck_size: int | None
    bottleneck_pattern: Mapping[str, int]
    activation: str
    scaling: float | str
    dropout: float
    drop: int
    init: str
    dtype: str

    def __post_init__(self) -> None:
        self.settle_targets()
        named, table = type(self).__name__, self.bottleneck_pattern
        Pattern(table, field="bottleneck_pattern", method=named)
        fields.settle(
            self,
            bottleneck_pattern=FrozenDict({entry: fields.whole(value) for entry, value in table.items()}),
            reduction_factor=fields.real(self.reduction_factor),
            bottleneck_size=fields.whole(self.bottleneck_size),
            scaling=fields.real(self.scaling),
            dropout=fields.real(self.dropout),
            drop=fields.whole(self.drop),
            dtype=str(self.dtype),
        )
        fields.check_finite(self, "reduction_factor", self.reduction_factor)
        if self.reduction_factor <= 0:
            raise JpeftError(f"{type(self).__name__}: reduction_factor={self.reduction_factor!r} is not positive")
        if self.bottleneck_size is not None:
            fields.check_whole(self, "bottleneck_size", self.bottleneck_size, least=1)
        for entry, size in self.bottleneck_pattern.items():
            fields.check_whole(self, f"bottleneck_pattern[{entry!r}]", size, least=1)
        if self.scaling != "learned":
            if isinstance(self.scaling, str):
                fields.check_choice(self, "scaling", self.scaling, ("learned", "a number"))
            fields.check_finite(self, "scaling", self.scaling)
        fields.check_choice(self, "activation", self.activation, tuple(ACTIVATIONS))
        fields.check_choice(self, "init", self.init, ("lora", "houlsby", "bert"))
        fields.check_choice(self, "dtype", self.dtype, fields.DTYPES)
        fields.check_rate(self, "dropout", self.dropout)
        fields.check_whole(self, "drop", self.drop, least=0)

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        widths = self._widths()
        for node, layers in self.resolve(model):
            for member in layers or node.members:
                widths(node, member, "", 0)
        widths.check()
        return super().apply(model, key)

    def _widths(self) -> Pattern:
        return Pattern(self.bottleneck_pattern, field="bottleneck_pattern", method=type(self).__name__)

    def form(self, module: Any) -> tuple[type[Bottleneck], int, int]:
        """The wrapper for `module`, and the input and output width of its network."""
        return SerialAdapter, (out := width_of(module, "out_features")), out

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> Bottleneck:
        form, inputs, outputs = self.form(innermost(base))
        return form(
            base,
            name=self.name,
            values=self.values(node, layers, key, inputs, outputs),
            learned=self.scaling == "learned",
            activation=self.activation,
            dropout=float(self.dropout),
            drop=self.drop,
            depth=_depths(node, layers),
            layers=layers,
        )

    def values(self, node: Node, layers: Layers, key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
        """Initial values of the network's variables, with the layer axes of the node.

        Where layers of a `Stack` differ in width, zeros fill up the narrower ones; they have no gradient and stay.
        """
        default = self.bottleneck_size or max(1, int(outputs // self.reduction_factor))
        table, lead = self._widths(), lead_of(node, layers)
        sizes = [table(node, member, "", default) for member in layers or node.members]
        keys = node.keys(key, self.name, lead, layers)

        def drawn(keys: jax.Array, width: int) -> dict[str, jax.Array]:
            def one(key: jax.Array) -> dict[str, jax.Array]:
                return start(self.init, key, inputs, width, outputs)

            for _ in range(keys.ndim):
                one = jax.vmap(one)
            return {name: _filled(name, value, max(sizes)) for name, value in one(keys).items()}

        if len(set(sizes)) == 1:
            made = drawn(keys, sizes[0])
        else:
            each = [drawn(keys[number], width) for number, width in enumerate(sizes)]
            made = {name: jnp.stack([one[name] for one in each]) for name in each[0]}
        scale = jnp.full(lead, 1.0 if isinstance(self.scaling, str) else self.scaling, jnp.float32)
        return {**{name: value.astype(self.dtype) for name, value in made.items()}, "scale": scale}


def _filled(name: str, value: jax.Array, width: int) -> jax.Array:
    """A variable of a network with zeros for the units up to `width`."""
    axis = {"down": -1, "down_bias": -1, "up": -2}.get(name)
    if axis is None:
        return value
    more = [(0, 0)] * value.ndim
    more[axis] = (0, width - value.shape[axis])
    return jnp.pad(value, more)


def width_of(module: Any, attribute: str) -> int:
    """The one width that `module` declares as its `in_features` or `out_features`."""
    declared = getattr(module, attribute, None)
    width = declared[0] if isinstance(declared, tuple) and len(declared) == 1 else declared
    if isinstance(width, bool) or not isinstance(width, int):
        raise JpeftError(
            f"an adapter cannot stand at a {type(module).__name__}, which does not say one width as its {attribute} "
            f"(found {declared!r}); name linear layers, or give the module that attribute"
        )
    return width


def _depths(node: Node, layers: Layers) -> np.ndarray:
    """The number of each covered layer, of shape lead; what lies in no layer counts as above all of them."""
    numbers = [node.layer(member) for member in layers or node.members]
    depths = np.array([np.iinfo(np.int32).max if number is None else number for number in numbers])
    lead = lead_of(node, layers)
    return np.broadcast_to(depths.reshape(-1, *(1,) * (len(lead) - 1)) if node.stack else depths[0], lead)


@dataclasses.dataclass(frozen=True)
class Houlsby(_Bottlenecks):
    """Two adapters in every layer, behind attention and behind the feed-forward, and trained norms (arXiv:1902.00751).

    reduction_factor: the model's width divided by the bottleneck's. bottleneck_size: the bottleneck's width itself.
    bottleneck_pattern: widths by layer or module, {name or regular expression: width}, the first fitting entry decides:
        `{"layers.0": 4}`. Layers of a `Stack` are filled up with zeros to the widest.
    activation: "relu", "gelu" (exact), "gelu_new", "swish" or "silu", "leaky_relu", "tanh".
    scaling: a factor on what an adapter adds, or "learned": one that trains and starts at 1.
    dropout: probability of zeroing a unit of the bottleneck while training.
    drop: in each training step, the adapters of the lowest n layers are left out, n drawn from 0 to `drop`
        (AdapterDrop, Rücklé et al. 2021, arXiv:2010.11918); see `jpeft.drop_adapters`.
    init: "lora" (W_up zero, so the model starts as the base), "houlsby" (near-zero normal values as in the paper) or
        "bert" (normal, standard deviation 0.02).
    targets: the modules to stand behind, which say their `out_features`; None: what the model declares. exclude,
        layers: see `jpeft.targets`.
    train_norms: whether norms train too; with `layers`, those of these layers. norms: which ones, entries as in
        `targets`; None: those that the model declares.
    dtype: of the variables, which are cast to that of the activations.
    name: keyed `<module path>/<name>/down`, `/up`, `/down_bias`, `/up_bias`; norms `<module path>/<name>/scale`, ...
    """

    kind: ClassVar[str] = "houlsby"
    role: ClassVar[Any] = ("attention_output", "feed_forward_output")

    reduction_factor: float = 16
    bottleneck_size: int | None = None
    bottleneck_pattern: Mapping[str, int] = FrozenDict()
    activation: str = "swish"
    scaling: float | str = 1.0
    dropout: float = 0.0
    drop: int = 0
    init: str = "lora"
    targets: Any = None
    exclude: Any = ()
    layers: Any = None
    train_norms: bool = True
    norms: Any = None
    dtype: str = "float32"
    name: str = "houlsby"

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.check_switch(self, "train_norms")
        fields.settle(self, norms=targets_or_none(self.norms))

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        made = super().apply(model, key)
        if not self.train_norms:
            return made
        try:
            return self._norm_tuning.apply(made, key)
        except JpeftError as error:
            raise JpeftError(f"{error}; name the norms to train by norms=, or set train_norms=False") from None

    def recorded(self, model: nnx.Module) -> tuple[Method, ...]:
        made = super().recorded(model)
        if made == (self,) and all(lasting(entry) for entry in self.norms or ()):
            return made
        adapters = tuple(replaced(method, train_norms=False, norms=None) for method in made)
        return (*adapters, *(self._norm_tuning.recorded(model) if self.train_norms else ()))

    @property
    def _norm_tuning(self) -> NormTuning:
        return NormTuning(targets=self.norms, layers=self.layers, name=self.name)


@dataclasses.dataclass(frozen=True)
class Pfeiffer(_Bottlenecks):
    """One adapter in every layer, behind the feed-forward (arXiv:2005.00247); half of `Houlsby`, and as good there.

    The fields are those of `Houlsby`; no norms train.
    """

    kind: ClassVar[str] = "pfeiffer"
    role: ClassVar[Any] = "feed_forward_output"

    reduction_factor: float = 16
    bottleneck_size: int | None = None
    bottleneck_pattern: Mapping[str, int] = FrozenDict()
    activation: str = "relu"
    scaling: float | str = 1.0
    dropout: float = 0.0
    drop: int = 0
    init: str = "lora"
    targets: Any = None
    exclude: Any = ()
    layers: Any = None
    dtype: str = "float32"
    name: str = "pfeiffer"


@dataclasses.dataclass(frozen=True)
class ParallelAdapter(_Bottlenecks):
    """A scaled adapter beside the feed-forward, from its input to its output (arXiv:2110.04366, section 3.4).

    The fields are those of `Houlsby`; no norms train. In BERT and RoBERTa the input is the residual of the sublayer. A
    target says its `in_features` and `out_features`, as linear layers and `nnx.MultiHeadAttention` do; one that is
    called with (y, residual) and adds the two says `adds_residual = True` and its `out_features`.
    """

    kind: ClassVar[str] = "parallel_adapter"
    role: ClassVar[Any] = "feed_forward"

    reduction_factor: float = 2
    bottleneck_size: int | None = None
    bottleneck_pattern: Mapping[str, int] = FrozenDict()
    activation: str = "relu"
    scaling: float | str = 4.0
    dropout: float = 0.0
    drop: int = 0
    init: str = "lora"
    targets: Any = None
    exclude: Any = ()
    layers: Any = None
    dtype: str = "float32"
    name: str = "parallel"

    def form(self, module: Any) -> tuple[type[Bottleneck], int, int]:
        out = width_of(module, "out_features")
        if getattr(module, "adds_residual", False):
            return ParallelAdapterOnResidual, out, out
        return ParallelAdapterWrapper, width_of(module, "in_features"), out
