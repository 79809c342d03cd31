"""LoRA: a low-rank update beside a frozen weight. Hu et al. 2021, arXiv:2106.09685; rsLoRA: arXiv:2312.03732.

    y = base(x) + ((dropout(x) A) * s) B,   s = alpha / rank (LoRA) or alpha / sqrt(rank) (rsLoRA)

A starts as U(-1/sqrt(fan_in), 1/sqrt(fan_in)) and B as zero, so the adapted model starts as the base; an embedding
starts with A zero and B normal. The product is never formed, except when the update is folded into the weight.
"""

from __future__ import annotations

import dataclasses
import math
import numbers as numbers_abc
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

    Its gradients are written for reverse mode (`jax.grad`, also of a gradient); `jax.jvp` through it raises TypeError.
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

        for field in ("rank_pattern", "alpha_pattern"):
            table = getattr(self, field)
            if not isinstance(table, Mapping) or not all(isinstance(entry, str) for entry in table):
                raise JpeftError(f"LoRA: {field}={table!r} is no mapping of names or regular expressions to values")
        settle(
            targets=entries(self.targets),
            exclude=entries(self.exclude),
            layers=_layers(self.layers),
            rank=_whole(self.rank),
            alpha=_real(self.alpha),
            dropout=_real(self.dropout),
            dtype=str(self.dtype),
            rank_pattern=FrozenDict({entry: _whole(value) for entry, value in self.rank_pattern.items()}),
            alpha_pattern=FrozenDict({entry: _real(value) for entry, value in self.alpha_pattern.items()}),
        )
        _check_rank("rank", self.rank, least=1)
        for entry, value in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{entry!r}]", value, least=0)
        given = {} if self.alpha is None else {"alpha": self.alpha}
        for entry, alpha in {**given, **self.alpha_pattern}.items():
            if not (_is_number(alpha) and math.isfinite(alpha)):
                raise JpeftError(f"LoRA: {entry}={alpha!r} is not a finite number")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise JpeftError(f"LoRA: dropout={self.dropout!r} is not in [0, 1)")
        if self.init not in ("kaiming", "gaussian"):
            raise JpeftError(f"LoRA: init={self.init!r}; choose 'kaiming' or 'gaussian'")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise JpeftError(f"LoRA: dtype={self.dtype!r}; choose 'float32', 'bfloat16' or 'float16'")
        if not (isinstance(self.name, str) and self.name.isidentifier() and self.name[0] != "_"):
            raise JpeftError(f"LoRA: name={self.name!r} is not an identifier (a letter, then letters, digits and _)")

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
        if not replacements:
            raise JpeftError(f"LoRA: rank_pattern={dict(self.rank_pattern)!r} gives every target rank 0")
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
    try:
        numbers = [given] if isinstance(given, numbers_abc.Integral) else list(given)
    except TypeError:
        numbers = []
    made = sorted({_whole(number) for number in numbers if isinstance(_whole(number), int)})
    if not made or len(made) != len(numbers) or made[0] < 0 or any(isinstance(number, bool) for number in numbers):
        raise JpeftError(f"layers={given!r}: give distinct layer numbers from 0, such as range(8, 16) or [0, 1]")
    return tuple(made)


def _whole(value: Any) -> Any:
    """NumPy's whole numbers as Python's; anything else as it is."""
    return int(value) if isinstance(value, numbers_abc.Integral) and not isinstance(value, bool) else value


def _real(value: Any) -> Any:
    """NumPy's numbers as Python's; anything else as it is."""
    plain = isinstance(value, bool | int | float) or not isinstance(value, numbers_abc.Real)
    return value if plain else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_rank(field: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise JpeftError(f"LoRA: {field}={value!r} is not a whole number of at least {least}")
