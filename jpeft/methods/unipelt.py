"""UniPELT: LoRA, prefix and adapter together, each behind a learned gate. Mao et al. 2022, arXiv:2110.07577.

    projection    W x + g(x) (alpha / r) x A B            g from the input of the projection
    attention     exp(q k) times g(x) at the prefix       g from the input of the attention
    feed-forward  y + g(y) f(y)                           g from the input of the adapter

with g(x) = sigmoid(x w + c) for each token. The paper's code takes the mean over all tokens of a text, which decoders
cannot know while they write, and multiplies the prefix's keys and values, so that a closed gate would still take
attention from the text; here a closed gate leaves the base.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jpeft.methods import fields
from jpeft.methods.bottleneck import Pfeiffer, width_of
from jpeft.methods.bottleneck_wrappers import Bottleneck
from jpeft.methods.method import Method
from jpeft.methods.prefix import PrefixTuning
from jpeft.methods.targeted import Targeted, lead_of, targets_or_none
from jpeft.methods.unipelt_wrappers import GatedLowRank, GatedSerialAdapter, PrefixGate
from jpeft.paths import Node
from jpeft.targets import Layers
from jpeft.wrapper import Wrapper, innermost


@dataclasses.dataclass(frozen=True)
class UniPELT(Method):
    """Adapter, prefix and LoRA with gates that choose among them by the input (arXiv:2110.07577).

    variant: "APL" for all three, "AP" for adapter and prefix.
    rank, alpha: of LoRA, on the projections to queries and values; alpha None means rank.
    num_virtual_tokens, reparameterize, hidden_size: of the prefix, as in `PrefixTuning`.
    reduction_factor, bottleneck_size, activation, dropout, drop: of the adapter behind the feed-forward, as in
        `Pfeiffer`.
    projections, attention, outputs: the modules for LoRA, prefix and adapter; None: those that the model declares.
    layers: the numbers of the layers to adapt; None means all.
    name: keyed `<module path>/<name>/gate`, `/gate_bias`, ... `jpeft.observe` returns the values of the gates.
    """

    kind: ClassVar[str] = "unipelt"

    variant: str = "APL"
    rank: int = 8
    alpha: float | None = None
    num_virtual_tokens: int = 10
    reparameterize: bool = True
    hidden_size: int = 512
    reduction_factor: float = 16
    bottleneck_size: int | None = None
    activation: str = "relu"
    dropout: float = 0.0
    drop: int = 0
    projections: Any = None
    attention: Any = None
    outputs: Any = None
    layers: Any = None
    dtype: str = "float32"
    name: str = "unipelt"

    def __post_init__(self) -> None:
        fields.check_choice(self, "variant", self.variant, ("AP", "APL"))
        fields.settle(self, rank=fields.whole(self.rank), alpha=fields.real(self.alpha))
        fields.check_whole(self, "rank", self.rank, least=1)
        if self.alpha is not None:
            fields.check_finite(self, "alpha", self.alpha)
        chosen = {name: targets_or_none(getattr(self, name)) for name in ("projections", "attention", "outputs")}
        fields.settle(self, layers=fields.layer_numbers(self.layers), dtype=str(self.dtype), **chosen)
        assert self.parts  # each checks its own fields

    @property
    def parts(self) -> tuple[Targeted, ...]:
        """What it consists of, in the order in which it is applied."""
        common: dict[str, Any] = {"layers": self.layers, "dtype": self.dtype, "name": self.name}
        prefix = PrefixTuning(
            num_virtual_tokens=self.num_virtual_tokens,
            reparameterize=self.reparameterize,
            hidden_size=self.hidden_size,
            targets=self.attention,
            **common,
        )
        adapter = _GatedAdapter(
            reduction_factor=self.reduction_factor,
            bottleneck_size=self.bottleneck_size,
            activation=self.activation,
            dropout=self.dropout,
            drop=self.drop,
            targets=self.outputs,
            **common,
        )
        low_rank = _LowRank(rank=self.rank, alpha=float(self.alpha or self.rank), targets=self.projections, **common)
        both = (prefix, _Gate(targets=self.attention, **common), adapter)
        return (*both, low_rank) if self.variant == "APL" else both

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        for part in self.parts:
            model = part.apply(model, key)
        return model

    def baked(self) -> UniPELT:
        return dataclasses.replace(self, reparameterize=False)


def _gate(method: Any, node: Node, layers: Layers, key: jax.Array, inputs: int) -> dict[str, jax.Array]:
    """Initial values of a gate: about a half open for every input."""
    lead = lead_of(node, layers)

    def one(key: jax.Array) -> jax.Array:
        return 0.02 * jax.random.normal(key, (inputs,))

    for _ in lead:
        one = jax.vmap(one)
    gate = one(node.keys(key, f"{method.name}/gate", lead, layers))
    return {"gate": gate.astype(method.dtype), "gate_bias": jnp.zeros(lead, method.dtype)}


@dataclasses.dataclass(frozen=True)
class _GatedAdapter(Pfeiffer):
    def form(self, module: Any) -> tuple[type[Bottleneck], int, int]:
        out = width_of(module, "out_features")
        return GatedSerialAdapter, out, out

    def values(self, node: Node, layers: Layers, key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
        return {**super().values(node, layers, key, inputs, outputs), **_gate(self, node, layers, key, inputs)}


@dataclasses.dataclass(frozen=True)
class _Gate(Targeted):
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = (nnx.Module,)
    role: ClassVar[Any] = "attention"

    targets: Any
    layers: Any
    dtype: str
    name: str
    exclude: Any = ()

    def __post_init__(self) -> None:
        self.settle_targets()

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> Wrapper:
        values = _gate(self, node, layers, key, width_of(innermost(base), "in_features"))
        return PrefixGate(base, name=self.name, values=values, layers=layers)


@dataclasses.dataclass(frozen=True)
class _LowRank(Targeted):
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = (nnx.Linear, nnx.LinearGeneral)
    role: ClassVar[Any] = ("query", "value")

    rank: int
    alpha: float
    targets: Any
    layers: Any
    dtype: str
    name: str
    exclude: Any = ()

    def __post_init__(self) -> None:
        self.settle_targets()

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> Wrapper:
        inputs, lead = width_of(innermost(base), "in_features"), lead_of(node, layers)
        out = innermost(base).out_features
        outputs = out if isinstance(out, int) else math.prod(out)

        def one(key: jax.Array) -> jax.Array:
            return jax.random.uniform(key, (inputs, self.rank), minval=-1.0, maxval=1.0) / math.sqrt(inputs)

        for _ in lead:
            one = jax.vmap(one)
        values = {
            "a": one(node.keys(key, self.name, lead, layers)).astype(self.dtype),
            "b": jnp.zeros((*lead, self.rank, outputs), self.dtype),
            "scale": jnp.full(lead, self.alpha / self.rank, jnp.float32),
            **_gate(self, node, layers, key, inputs),
        }
        return GatedLowRank(base, name=self.name, values=values, layers=layers)
