"""LoRA: a low-rank update beside a frozen weight. Hu et al. 2021, arXiv:2106.09685; rsLoRA: arXiv:2312.03732.

    y = base(x) + ((dropout(x) A) * s) B,   s = alpha / rank (LoRA) or alpha / sqrt(rank) (rsLoRA)

A starts as U(-1/sqrt(fan_in), 1/sqrt(fan_in)) and B as zero, so the adapted model starts as the base; an embedding
starts with A zero and B normal. The product is never formed, except when the update is folded into the weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from jpeft import kinds, surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.low_rank import FORMS, LoRAWrapper
from jpeft.methods.method import refuse_second
from jpeft.methods.targeted import Targeted, covered, lead_of
from jpeft.paths import Node
from jpeft.targets import ALL_LINEAR, Pattern, prefix_of


@dataclasses.dataclass(frozen=True)
class LoRA(Targeted):
    """Low-rank adaptation (arXiv:2106.09685) of linear, einsum, convolution and embedding layers.

    rank: of the update, at least 1.
    alpha: the update is scaled by alpha / rank (alpha / sqrt(rank) with `use_rslora`); None means alpha = rank.
    dropout: probability of zeroing an element of the update's input while training.
    targets, exclude: see `jpeft.targets`; `"all-linear"` is every linear layer but the output head.
    layers: the numbers of the layers to adapt (`range(8, 16)`); None means all.
    rank_pattern, alpha_pattern: {name or regular expression: value}, the first fitting entry decides; rank 0 leaves a
        module as it is. Works per layer: `{"layers.0": 4}`.
    init: how A starts: "kaiming" (uniform, as in the paper's code) or "gaussian" (standard deviation 1 / rank).
    dtype: of A and B; they are cast to the base's output dtype where they are used.
    name: under which the variables are keyed: `<module path>/<name>/a` and `/b`.

    Its gradients are written for reverse mode (`jax.grad`, also of a gradient); `jax.jvp` through it raises TypeError.
    """

    kind: ClassVar[str] = "lora"
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = tuple(FORMS)

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: Any = ALL_LINEAR
    exclude: Any = ()
    layers: Any = None
    rank_pattern: Mapping[str, int] = FrozenDict()
    alpha_pattern: Mapping[str, float] = FrozenDict()
    use_rslora: bool = False
    init: str = "kaiming"
    dtype: str = "float32"
    name: str = "lora"

    def __post_init__(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            table = getattr(self, field)
            if not isinstance(table, Mapping) or not all(isinstance(entry, str) for entry in table):
                raise JpeftError(f"LoRA: {field}={table!r} is no mapping of names or regular expressions to values")
        self.settle_targets()
        fields.settle(
            self,
            rank=fields.whole(self.rank),
            alpha=fields.real(self.alpha),
            dropout=fields.real(self.dropout),
            dtype=str(self.dtype),
            rank_pattern=FrozenDict({entry: fields.whole(value) for entry, value in self.rank_pattern.items()}),
            alpha_pattern=FrozenDict({entry: fields.real(value) for entry, value in self.alpha_pattern.items()}),
        )
        fields.check_whole(self, "rank", self.rank, least=1)
        for entry, value in self.rank_pattern.items():
            fields.check_whole(self, f"rank_pattern[{entry!r}]", value, least=0)
        given = {} if self.alpha is None else {"alpha": self.alpha}
        for entry, alpha in {**given, **self.alpha_pattern}.items():
            fields.check_finite(self, entry, alpha)
        fields.check_rate(self, "dropout", self.dropout)
        fields.check_choice(self, "init", self.init, ("kaiming", "gaussian"))
        fields.check_choice(self, "dtype", self.dtype, fields.DTYPES)

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        chosen = self.resolve(model)
        prefix = prefix_of(model)
        ranks = Pattern(self.rank_pattern, field="rank_pattern", method="LoRA")
        alphas = Pattern(self.alpha_pattern, field="alpha_pattern", method="LoRA")
        replacements: dict[surgery.Path, Callable[[Any], Any]] = {}
        for node, layers in chosen:
            refuse_second(node.module, self.name, node.name)
            members = node.members if layers is None else layers
            slots = {m: (ranks(node, m, prefix, self.rank), alphas(node, m, prefix, self._alpha)) for m in members}
            if any(rank for rank, _ in slots.values()):
                replacements[node.path] = self._maker(node, slots, key)
        ranks.check()
        alphas.check()
        if not replacements:
            raise JpeftError(f"LoRA: rank_pattern={dict(self.rank_pattern)!r} gives every target rank 0")
        return surgery.replace(model, replacements)

    @property
    def _alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    def _maker(
        self, node: Node, slots: dict[int | None, tuple[int, float]], key: jax.Array
    ) -> Callable[[Any], LoRAWrapper]:
        layers = covered(node, [m for m, (rank, _) in slots.items() if rank and m is not None])
        lead = lead_of(node, layers)
        rank = max(r for r, _ in slots.values())
        members = (node.members if node.stack else (None,)) if layers is None else layers
        scale = np.stack([_slot_scales(rank, *slots.get(m, (0, 1.0)), self.use_rslora) for m in members])
        scale = scale.reshape(*scale.shape[:1], *(1,) * (len(lead) - 1), rank) if node.stack else scale[0]
        scale = np.broadcast_to(scale, (*lead, rank))
        keys = node.keys(key, self.name, lead, layers)
        kind = kinds.kind_of(node.module)
        assert kind is not None

        def wrap(base: Any) -> LoRAWrapper:
            try:
                return FORMS[kind](
                    base, method=self, rank=rank, lead=lead, keys=keys, scale=jnp.asarray(scale), layers=layers
                )
            except JpeftError as error:
                raise JpeftError(f"{error} ({node.name or 'the model itself'!r})") from None

        return wrap


def _slot_scales(rank: int, live: int, alpha: float, rslora: bool) -> np.ndarray:
    """alpha / r for the live slots of one layer's padded rank, 0 for the rest."""
    value = alpha / (math.sqrt(live) if rslora else live) if live else 0.0
    return np.where(np.arange(rank) < live, value, 0.0).astype(np.float32)
