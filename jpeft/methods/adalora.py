"""AdaLoRA: updates in the form of an SVD whose singular values are pruned during training. Zhang et al. 2023,
arXiv:2303.10512.

    y = base(x) + alpha / r * ((dropout(x) A) * e) B

A and B start normal, e as zero; `penalty` keeps A and B near orthogonal. The allocator scores every triple (a column of
A, an entry of e, a row of B) of all layers by smoothed |value * gradient| and by how uncertain that is, and sets the
entries of e with the lowest scores to zero, down to a budget that falls with the cube of the remaining time. It is part
of the optimizer (`jpeft.optimizer`), so its averages are saved and restored with the optimizer's state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from jpeft import kinds, surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.low_rank import LoRALinear, LoRALinearGeneral, LoRAWrapper
from jpeft.methods.method import refuse_second
from jpeft.methods.targeted import Targeted, lead_of
from jpeft.paths import Node, nodes
from jpeft.targets import ALL_LINEAR, Layers
from jpeft.variables import Trainable
from jpeft.wrapper import Wrapper


class AdaLoRAWrapper(LoRAWrapper):
    """A linear layer with an update in SVD form; e: `Trainable`, lead + [r], the singular values.

    share: the weight of this wrapper's matrices in the penalty.
    """

    takes_many = False

    def __init__(self, base: Any, *, share: float, **settings: Any):
        super().__init__(base, **settings)
        self.e = Trainable(jnp.zeros(self.scale.shape, self.a.dtype), group="adalora_e")
        self.share = share

    @staticmethod
    def start(key: jax.Array, shape_a: tuple[int, ...], shape_b: tuple[int, ...], init: str) -> tuple[Array, Array]:
        left, right = jax.random.split(key)
        return 0.02 * jax.random.normal(left, shape_a), 0.02 * jax.random.normal(right, shape_b)

    def factors(self) -> tuple[Array, Array, Array]:
        a, b, scale = super().factors()
        return a, b, scale * self.e[...]

    def penalty(self) -> jax.Array:
        """The distances of A'A and BB' from the identity (Frobenius norms), summed over layers and weighted."""
        lead, rank = self.e.shape[:-1], self.e.shape[-1]
        a, b = (factor[...].astype(jnp.float32) for factor in (self.a, self.b))
        columns = a.reshape(*lead, -1, rank)
        rows = jnp.swapaxes(b.reshape(*lead, rank, -1), -1, -2)

        def distance(m: Array) -> Array:
            product = jnp.einsum("...ir,...is->...rs", m, m, precision=jax.lax.Precision.HIGHEST)
            return jnp.sum(jnp.sqrt(jnp.sum((product - jnp.eye(rank)) ** 2, axis=(-1, -2))))

        return self.share * (distance(columns) + distance(rows))


class AdaLoRALinear(AdaLoRAWrapper, LoRALinear):
    """On `nnx.Linear`."""


class AdaLoRALinearGeneral(AdaLoRAWrapper, LoRALinearGeneral):
    """On `nnx.LinearGeneral`."""


_FORMS: dict[type[nnx.Module], type[AdaLoRAWrapper]] = {
    nnx.Linear: AdaLoRALinear,
    nnx.LinearGeneral: AdaLoRALinearGeneral,
}


_MOST_STEPS = 2**31 - 1  # they are counted in int32


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Targeted):
    """AdaLoRA (arXiv:2303.10512) on linear layers. Train with `jpeft.optimizer(model, tx)` and `jpeft.penalty(model)`.

    rank: average rank per matrix in the end. initial_rank: of every matrix in the beginning.
    alpha: the update is scaled by alpha / initial_rank.
    total_steps: of training, which the budget's course depends on; None: as `jpeft.optimizer` is told.
    warmup_steps: the first ones, with the full budget. final_steps: the last ones, in which the budget stays as it is.
    interval: steps from one pruning to the next.
    beta1, beta2: how slowly the averages of importance and of its uncertainty change.
    orthogonality: weight of the penalty.
    targets, exclude, layers: see `jpeft.targets`.
    name: `<module path>/<name>/a`, `/b` and `/e`.
    """

    kind: ClassVar[str] = "adalora"
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = tuple(_FORMS)
    # What the wrappers of LoRA ask of their method.
    init: ClassVar[str] = "normal"
    trains_a: ClassVar[bool] = True

    rank: int = 8
    initial_rank: int = 12
    alpha: float = 8.0
    dropout: float = 0.0
    total_steps: int | None = None
    warmup_steps: int = 0
    final_steps: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    targets: Any = ALL_LINEAR
    exclude: Any = ()
    layers: Any = None
    dtype: str = "float32"
    name: str = "adalora"

    def __post_init__(self) -> None:
        self.settle_targets()
        numbers = ("alpha", "dropout", "beta1", "beta2", "orthogonality")
        wholes = ("rank", "initial_rank", "total_steps", "warmup_steps", "final_steps", "interval")
        fields.settle(
            self,
            dtype=str(self.dtype),
            **{field: fields.real(getattr(self, field)) for field in numbers},
            **{field: fields.whole(getattr(self, field)) for field in wholes},
        )
        for field in ("rank", "initial_rank"):
            fields.check_whole(self, field, getattr(self, field), least=1)
        for field, least in (("interval", 1), ("warmup_steps", 0), ("final_steps", 0)):
            fields.check_whole(self, field, getattr(self, field), least=least, most=_MOST_STEPS)
        for field in ("alpha", "orthogonality"):
            fields.check_finite(self, field, getattr(self, field))
        for field in ("dropout", "beta1", "beta2"):
            fields.check_rate(self, field, getattr(self, field))
        fields.check_choice(self, "dtype", self.dtype, fields.DTYPES)
        if self.rank > self.initial_rank:
            raise JpeftError(
                f"AdaLoRA: rank={self.rank} is more than initial_rank={self.initial_rank}, from which it falls"
            )
        if self.total_steps is not None:
            fields.check_whole(self, "total_steps", self.total_steps, least=1, most=_MOST_STEPS)
            if self.warmup_steps >= self.total_steps - self.final_steps:
                raise JpeftError(
                    f"AdaLoRA: warmup_steps={self.warmup_steps} and final_steps={self.final_steps} leave none of "
                    f"total_steps={self.total_steps} to prune in"
                )

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        found = self.resolve(model)
        share = self.orthogonality / sum(2 * math.prod(lead_of(node, layers)) for node, layers in found)
        replacements: dict[surgery.Path, Callable[[Any], Any]] = {}
        for node, layers in found:
            refuse_second(node.module, self.name, node.name)
            replacements[node.path] = self._placed(node, layers, key, share)
        return surgery.replace(model, replacements)

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array, share: float = 0.0) -> AdaLoRAWrapper:
        lead, kind = lead_of(node, layers), kinds.kind_of(base)
        assert kind is not None
        return _FORMS[kind](
            base,
            share=share,
            method=self,
            rank=self.initial_rank,
            lead=lead,
            keys=node.keys(key, self.name, lead, layers),
            # The small number is the peer's, whose files these scales have to fit.
            scale=jnp.full((*lead, self.initial_rank), self.alpha / (self.initial_rank + 1e-5)),
            layers=layers,
        )

    def optimizer(
        self, model: nnx.Module, tx: optax.GradientTransformation, total_steps: int | None
    ) -> optax.GradientTransformation:
        if self.total_steps is None and total_steps is None:
            raise JpeftError(
                "AdaLoRA: total_steps is not set, and the course of the budget depends on it; give it to the method or "
                "to jpeft.optimizer(model, tx, total_steps=)"
            )
        planned = self if self.total_steps is not None else dataclasses.replace(self, total_steps=total_steps)
        return _allocating(planned, optax.with_extra_args_support(tx))

    def unfinished(self, model: nnx.Module) -> str | None:
        ranks = adalora_ranks(model).values()
        pruned = any(bool(jnp.any(rank < self.initial_rank)) for rank in ranks)
        if pruned or self.rank == self.initial_rank:
            return None
        return (
            f"AdaLoRA: every matrix still has all {self.initial_rank} singular values, where rank={self.rank} was "
            "asked for: the allocator never ran, or training ended in its warm-up. It is part of the optimizer that "
            "jpeft.optimizer(model, tx, total_steps=) returns"
        )

    def budget(self, step: int | Array) -> Array:
        """How many triples per matrix stay after `step` (from 1), on average; float32."""
        assert self.total_steps is not None
        course = self.total_steps - self.final_steps - self.warmup_steps
        left = jnp.clip(1 - (jnp.asarray(step) - self.warmup_steps) / course, 0, 1)
        return (self.initial_rank - self.rank) * left**3 + self.rank


class AllocatorState(NamedTuple):
    """inner: of the optimizer inside. step: int32. importance, uncertainty: the averages, as the method's variables.
    kept: {key of e: which entries stay}, bool."""

    inner: Any
    step: Array
    importance: dict[str, Array]
    uncertainty: dict[str, Array]
    kept: dict[str, Array]


def _allocating(method: AdaLoRA, tx: Any) -> Any:
    """`tx`, after each of whose updates the singular values outside the budget are zero."""
    total, final = method.total_steps or 0, method.final_steps

    def own(tree: Mapping[str, Array]) -> dict[str, Array]:
        return {key: value for key, value in tree.items() if key.rpartition("/")[0].endswith(f"/{method.name}")}

    def init(params: Mapping[str, Array]) -> AllocatorState:
        mine = own(params)
        # Arrays of their own: a training step donates the whole state.
        importance, uncertainty = ({key: jnp.zeros(value.shape) for key, value in mine.items()} for _ in range(2))
        kept = {key: jnp.ones(value.shape, bool) for key, value in mine.items() if key.endswith("/e")}
        return AllocatorState(tx.init(params), jnp.zeros((), jnp.int32), importance, uncertainty, kept)

    def update(
        gradient: Mapping[str, Array], state: AllocatorState, params: Mapping[str, Array] | None = None, **extra: Any
    ) -> tuple[dict[str, Array], AllocatorState]:
        if params is None:
            raise JpeftError("AdaLoRA: call the optimizer as tx.update(gradient, state, adapter)")
        updates, inner = tx.update(gradient, state.inner, params, **extra)
        step = state.step + 1
        new = own(optax.apply_updates(params, updates))
        counting = step < total - final

        importance, uncertainty = {}, {}
        for key, value in new.items():
            sensitivity = jnp.abs(value.astype(jnp.float32) * gradient[key].astype(jnp.float32))
            mean = method.beta1 * state.importance[key] + (1 - method.beta1) * sensitivity
            spread = method.beta2 * state.uncertainty[key] + (1 - method.beta2) * jnp.abs(sensitivity - mean)
            importance[key] = jnp.where(counting, mean, state.importance[key])
            uncertainty[key] = jnp.where(counting, spread, state.uncertainty[key])

        chosen = _within_budget(method, importance, uncertainty, step)
        due = counting & (step > method.warmup_steps) & (step % method.interval == 0) | (step == total - final)
        kept, ended = {}, step > total - final
        updates = dict(updates)
        for key, live in state.kept.items():
            kept[key] = jnp.where(due, chosen[key], live)
            masked = jnp.where((due | ended) & ~kept[key], 0, new[key])
            updates[key] = masked - params[key]
        return updates, AllocatorState(inner, step, importance, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _within_budget(
    method: AdaLoRA, importance: Mapping[str, Array], uncertainty: Mapping[str, Array], step: Array
) -> dict[str, Array]:
    """{key of e: whether an entry's score is among the best that the budget allows}, bool."""
    element = {key: importance[key] * uncertainty[key] for key in importance}
    scores = {}
    for key, value in element.items():
        if not key.endswith("/e"):
            continue
        lead, rank = value.shape[:-1], value.shape[-1]
        a, b = (element[f"{key[:-1]}{name}"] for name in "ab")
        scores[key] = value + a.reshape(*lead, -1, rank).mean(axis=-2) + b.reshape(*lead, rank, -1).mean(axis=-1)
    everything = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
    matrices = len(everything) // method.initial_rank
    # The peer rounds the total down; so does this, where float32 holds it exactly.
    out = len(everything) - jnp.floor(method.budget(step) * matrices + 1e-4).astype(jnp.int32)
    threshold = jnp.where(out > 0, everything[jnp.maximum(out - 1, 0)], -1.0)
    return {key: score > threshold for key, score in scores.items()}


def adalora_ranks(model: nnx.Module) -> dict[str, Array]:
    """{path of an adapted module: how many singular values each of its layers keeps}, int32 of its layer axes."""
    found = {}
    for node in nodes(model):
        module = node.module
        while isinstance(module, Wrapper):
            if isinstance(module, AdaLoRAWrapper):
                found[node.name] = jnp.sum(module.e[...] != 0, axis=-1)
            module = module.base
    return found
