"""Mix-and-match adapter: prefix tuning and a scaled parallel adapter. He et al. 2022, arXiv:2110.04366, section 4.6."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from jpeft.methods import fields
from jpeft.methods.bottleneck import ParallelAdapter
from jpeft.methods.compose import compose
from jpeft.methods.method import Method
from jpeft.methods.prefix import PrefixTuning
from jpeft.methods.targeted import targets_or_none


@dataclasses.dataclass(frozen=True)
class MAM(Method):
    """A short prefix in every attention, and a wide scaled adapter beside every feed-forward (arXiv:2110.04366).

    It is `compose(PrefixTuning(...), ParallelAdapter(...))`, which is also how it is recorded and saved.

    num_virtual_tokens, reparameterize, hidden_size: as in `PrefixTuning`.
    reduction_factor, bottleneck_size, activation, scaling, dropout, drop: as in `ParallelAdapter`.
    attention, feed_forward: the modules for the one and the other; None: those that the model declares.
    layers: the numbers of the layers to adapt; None means all.
    name: of both parts.
    """

    kind: ClassVar[str] = "mam"

    num_virtual_tokens: int = 30
    reparameterize: bool = True
    hidden_size: int = 512
    reduction_factor: float = 2
    bottleneck_size: int | None = None
    activation: str = "relu"
    scaling: float | str = 4.0
    dropout: float = 0.0
    drop: int = 0
    attention: Any = None
    feed_forward: Any = None
    layers: Any = None
    dtype: str = "float32"
    name: str = "mam"

    def __post_init__(self) -> None:
        chosen = {name: targets_or_none(getattr(self, name)) for name in ("attention", "feed_forward")}
        fields.settle(self, layers=fields.layer_numbers(self.layers), dtype=str(self.dtype), **chosen)
        assert self.parts  # each checks its own fields

    @property
    def parts(self) -> tuple[PrefixTuning, ParallelAdapter]:
        """The two methods that it consists of."""
        prefix = PrefixTuning(
            num_virtual_tokens=self.num_virtual_tokens,
            reparameterize=self.reparameterize,
            hidden_size=self.hidden_size,
            targets=self.attention,
            layers=self.layers,
            dtype=self.dtype,
            name=self.name,
        )
        adapter = ParallelAdapter(
            reduction_factor=self.reduction_factor,
            bottleneck_size=self.bottleneck_size,
            activation=self.activation,
            scaling=self.scaling,
            dropout=self.dropout,
            drop=self.drop,
            targets=self.feed_forward,
            layers=self.layers,
            dtype=self.dtype,
            name=self.name,
        )
        return prefix, adapter

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        return compose(*self.parts).apply(model, key)

    def recorded(self, model: nnx.Module) -> tuple[Method, ...]:
        return compose(*self.parts).recorded(model)
