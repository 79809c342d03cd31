"""LoRA: a low-rank update beside a frozen weight. Hu et al. 2021, arXiv:2106.09685; rsLoRA: arXiv:2312.03732.

    y = base(x) + ((dropout(x) A) * s) B,   s = alpha / rank (LoRA) or alpha / sqrt(rank) (rsLoRA)

A starts as U(-1/sqrt(fan_in), 1/sqrt(fan_in)) and B as zero, so the adapted model starts as the base; an embedding
starts with A zero and B normal. The product is never formed, except when the update is folded into the weight.

    LoRAPlus  B learns faster than A. Hayou et al. 2024, arXiv:2402.12354
    LoRAFA    A stays as it started, so layers keep x A for the backward pass and not x. Zhang et al. 2023,
              arXiv:2308.03303
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import FrozenDict

from jpeft import kinds, surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.low_rank import FORMS, LoRAWrapper
from jpeft.methods.method import refuse_second
from jpeft.methods.starts import FROM_ELSEWHERE, INITS
from jpeft.methods.targeted import Targeted, covered, lead_of
from jpeft.paths import Node
from jpeft.targets import ALL_LINEAR, Pattern, prefix_of

_MOST_RANK = 2**16  # each module's scales, one for each of the rank, are written out


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
    use_rslora: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
    init: how A and B start, one of `jpeft.methods.starts.INITS`: "kaiming" (as in the paper's code), "gaussian",
        "orthogonal" (even ranks), "pissa" and "olora" (from the weight; the model still starts as the base), "loftq"
        and "eva" (through the functions `jpeft.loftq` and `jpeft.eva`, which are given what these need, as `jpeft
        train` does).
    dtype: of A and B; they are cast to the base's output dtype where they are used.
    name: under which the variables are keyed: `<module path>/<name>/a` and `/b`.

    Its gradients are written for reverse mode (`jax.grad`, also of a gradient); `jax.jvp` through it raises TypeError.
    """

    kind: ClassVar[str] = "lora"
    forms: ClassVar[dict[type[nnx.Module], type[LoRAWrapper]]] = FORMS
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = tuple(FORMS)
    trains_a: ClassVar[bool] = True

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
                raise JpeftError(
                    f"{type(self).__name__}: {field}={table!r} is no mapping of names or regular expressions to values"
                )
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
        fields.check_whole(self, "rank", self.rank, least=1, most=_MOST_RANK)
        fields.check_switch(self, "use_rslora")
        for entry, value in self.rank_pattern.items():
            fields.check_whole(self, f"rank_pattern[{entry!r}]", value, least=0, most=_MOST_RANK)
        if self.alpha is not None:
            fields.check_finite(self, "alpha", self.alpha)
        for entry, alpha in self.alpha_pattern.items():
            fields.check_finite(self, f"alpha_pattern[{entry!r}]", alpha)
        fields.check_rate(self, "dropout", self.dropout)
        fields.check_choice(self, "init", self.init, INITS)
        self._check_start()
        fields.check_choice(self, "dtype", self.dtype, fields.DTYPES)

    def _check_start(self) -> None:
        alphas = (self.rank if self.alpha is None else self.alpha, *self.alpha_pattern.values())
        if self.init == "pissa" and min(alphas) <= 0:
            raise JpeftError(f"{type(self).__name__}: init='pissa' needs alpha above 0, found {min(alphas)}")
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise JpeftError(f"{type(self).__name__}: init='orthogonal' needs even ranks, found {odd[0]}")

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        if self.init in FROM_ELSEWHERE:
            raise JpeftError(f"{type(self).__name__}: init={self.init!r} needs {FROM_ELSEWHERE[self.init]}")
        chosen = self.resolve(model)
        prefix = prefix_of(model)
        ranks = Pattern(self.rank_pattern, field="rank_pattern", method=type(self).__name__)
        alphas = Pattern(self.alpha_pattern, field="alpha_pattern", method=type(self).__name__)
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
            raise JpeftError(
                f"{type(self).__name__}: rank_pattern={dict(self.rank_pattern)!r} gives every target rank 0"
            )
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
                return self.forms[kind](
                    base, method=self, rank=rank, lead=lead, keys=keys, scale=jnp.asarray(scale), layers=layers
                )
            except JpeftError as error:
                raise JpeftError(f"{error} ({node.name or 'the model itself'!r})") from None

        return wrap


def _slot_scales(rank: int, live: int, alpha: float, rslora: bool) -> np.ndarray:
    """alpha / r for the live slots of one layer's padded rank, 0 for the rest."""
    value = alpha / (math.sqrt(live) if rslora else live) if live else 0.0
    return np.where(np.arange(rank) < live, value, 0.0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA+ (arXiv:2402.12354): the updates of B are larger, through `jpeft.optimizer`. The other fields are LoRA's.

    ratio: how many times as large as those of A.
    """

    kind: ClassVar[str] = "lora_plus"

    ratio: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.settle(self, ratio=fields.real(self.ratio))
        fields.check_finite(self, "ratio", self.ratio)
        if self.ratio <= 0:
            raise JpeftError(f"{type(self).__name__}: ratio={self.ratio!r} is not above 0")

    def optimizer(
        self, model: nnx.Module, tx: optax.GradientTransformation, total_steps: int | None
    ) -> optax.GradientTransformation:
        end = f"/{self.name}/b"

        def chosen(tree: Mapping[str, Any]) -> dict[str, bool]:
            return {key: key.endswith(end) for key in tree}

        return optax.chain(tx, optax.masked(optax.scale(self.ratio), chosen))


@dataclasses.dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA-FA (arXiv:2308.03303): A is saved with the adapter and never trained."""

    kind: ClassVar[str] = "lora_fa"
    forms: ClassVar[dict[type[nnx.Module], type[LoRAWrapper]]] = {
        # An embedding's a starts as zero and would stay so.
        kind: form
        for kind, form in FORMS.items()
        if kind is not nnx.Embed
    }
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = tuple(forms)
    trains_a: ClassVar[bool] = False
