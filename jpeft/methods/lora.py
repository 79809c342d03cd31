"""LoRA: a low-rank update beside a frozen weight. Hu et al. 2021, arXiv:2106.09685; rsLoRA: arXiv:2312.03732.

    y = base(x) + ((dropout(x) A) * s) B,   s = alpha / rank (LoRA) or alpha / sqrt(rank) (rsLoRA)

A starts as U(-1/sqrt(fan_in), 1/sqrt(fan_in)) and B as zero, so the adapted model starts as the base; an embedding
starts with A zero and B normal. The product is never formed, except when the update is folded into the weight.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict

from jpeft import kinds, surgery
from jpeft.errors import JpeftError
from jpeft.methods.low_rank import FORMS, LoRAWrapper
from jpeft.methods.method import Method, refuse_second
from jpeft.paths import Node
from jpeft.stack import runs
from jpeft.targets import ALL_LINEAR, Layers, Pattern, entries, prefix_of, resolve

# More scans than this cost more compile time than the layers in between are worth; then the hull is adapted and the
# layers in its holes get scale 0.
_MOST_RUNS = 4


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
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
    """

    kind: ClassVar[str] = "lora"

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
        def settle(**values: Any) -> None:
            for field, value in values.items():
                object.__setattr__(self, field, value)

        settle(
            targets=entries(self.targets),
            exclude=entries(self.exclude),
            layers=_layers(self.layers),
            rank_pattern=FrozenDict(self.rank_pattern or {}),
            alpha_pattern=FrozenDict(self.alpha_pattern or {}),
        )
        _check_rank("rank", self.rank, least=1)
        for entry, value in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{entry!r}]", value, least=0)
        for entry, alpha in [("alpha", self.alpha), *self.alpha_pattern.items()]:
            if alpha is not None and not (_is_number(alpha) and math.isfinite(alpha)):
                raise JpeftError(f"LoRA: {entry}={alpha!r} is not a finite number")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise JpeftError(f"LoRA: dropout={self.dropout!r} is not in [0, 1)")
        if self.init not in ("kaiming", "gaussian"):
            raise JpeftError(f"LoRA: init={self.init!r}; choose 'kaiming' or 'gaussian'")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise JpeftError(f"LoRA: dtype={self.dtype!r}; choose 'float32', 'bfloat16' or 'float16'")
        if not (isinstance(self.name, str) and self.name.isidentifier()):
            raise JpeftError(f"LoRA: name={self.name!r} is not an identifier")

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        chosen = self._resolve(model)
        prefix = prefix_of(model)
        ranks = Pattern(self.rank_pattern, field="rank_pattern", method="LoRA")
        alphas = Pattern(self.alpha_pattern, field="alpha_pattern", method="LoRA")
        replacements: dict[surgery.Path, Callable[[Any], Any]] = {}
        for node, layers in chosen:
            refuse_second(node.module, self.name, node.name)
            members = node.members if layers is None else layers
            slots = {m: (ranks(node, m, prefix, self.rank), alphas(node, m, prefix, self._alpha)) for m in members}
            if any(rank for rank, _ in slots.values()):
                replacements[node.path] = self._wrapper(node, slots, key)
        ranks.check()
        alphas.check()
        return surgery.replace(model, replacements)

    def recorded(self, model: nnx.Module) -> tuple[Method, ...]:
        if not any(callable(entry) for entry in (*self.targets, *self.exclude)):
            return (self,)
        found = [node.expanded(member) for node, layers in self._resolve(model) for member in layers or (None,)]
        exact = tuple(f"^{re.escape(name)}$" for name in found)
        return (dataclasses.replace(self, targets=exact, exclude=(), layers=None),)

    def _resolve(self, model: nnx.Module) -> list[tuple[Node, Layers]]:
        return resolve(
            model, targets=self.targets, exclude=self.exclude, layers=self.layers, kinds=tuple(FORMS), method="LoRA"
        )

    @property
    def _alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)

    def _wrapper(
        self, node: Node, slots: dict[int | None, tuple[int, float]], key: jax.Array
    ) -> Callable[[Any], LoRAWrapper]:
        layers = _covered(node, [m for m, (rank, _) in slots.items() if rank and m is not None])
        lead = kinds.lead(node.module)
        if layers is not None:
            lead = (len(layers), *lead[1:])
        rank = max(r for r, _ in slots.values())
        members = (node.members if node.stack else (None,)) if layers is None else layers
        scale = np.stack([_slot_scales(rank, *slots.get(m, (0, 1.0)), self.use_rslora) for m in members])
        scale = scale.reshape(*scale.shape[:1], *(1,) * (len(lead) - 1), rank) if node.stack else scale[0]
        scale = np.broadcast_to(scale, (*lead, rank))
        keys = node.keys(key, self.name, lead, layers)
        kind = kinds.kind_of(node.module)
        assert kind is not None
        return lambda base: FORMS[kind](
            base, method=self, rank=rank, lead=lead, keys=keys, scale=jnp.asarray(scale), layers=layers
        )


def _slot_scales(rank: int, live: int, alpha: float, rslora: bool) -> np.ndarray:
    """alpha / r for the live slots of one layer's padded rank, 0 for the rest."""
    value = alpha / (math.sqrt(live) if rslora else live) if live else 0.0
    return np.where(np.arange(rank) < live, value, 0.0).astype(np.float32)


def _covered(node: Node, live: list[int]) -> Layers:
    """The layers a wrapper's variables cover: None for all, the live ones, or their hull if those lie scattered."""
    if node.length is None or len(live) == node.length:
        return None
    if len(runs(node.length, [set(live)])) <= _MOST_RUNS:
        return tuple(live)
    hull = tuple(range(live[0], live[-1] + 1))
    return None if len(hull) == node.length else hull


def _layers(given: Any) -> Layers:
    if given is None:
        return None
    numbers = [given] if isinstance(given, int) and not isinstance(given, bool) else given
    try:
        made = sorted({int(number) for number in numbers if not isinstance(number, bool)})
        whole = len(made) == len(list(numbers)) and all(int(n) == n and n >= 0 for n in numbers)
    except (TypeError, ValueError):
        made, whole = [], False
    if not whole or not made:
        raise JpeftError(f"layers={given!r}: give distinct layer numbers from 0, such as range(8, 16) or [0, 1]")
    return tuple(made)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rank(field: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise JpeftError(f"LoRA: {field}={value!r} is not a whole number of at least {least}")
