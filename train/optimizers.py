"""The optimizer of a run: which rule, and for each group of arrays its learning rate and weight decay.

Learning rates are given to each update and are no part of the optimizer, so runs that differ in them, and in the seed,
run the same compiled programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import jpeft
from jpeft import paths
from jpeft.errors import JpeftError, nearest
from train.schema import TrainingConfig

Decay = Mapping[str, bool]
Rule = Callable[[float, Decay], optax.GradientTransformation]  # of weight decay; at the learning rate 1


def _adamw(decay: float, on: Decay) -> optax.GradientTransformation:
    return optax.adamw(1.0, weight_decay=decay, mask=_chosen(on))


def _adamw8bit(decay: float, on: Decay) -> optax.GradientTransformation:
    return optax.chain(
        jpeft.quant.scale_by_adam8bit(),
        *([optax.add_decayed_weights(decay, _chosen(on))] if decay else []),
        optax.scale_by_learning_rate(1.0),
    )


def _adafactor(decay: float, on: Decay) -> optax.GradientTransformation:
    # The decay that optax.adafactor offers is not multiplied by the learning rate; this one is, as everywhere here.
    # Updates are not scaled by the size of the parameter: LoRA's B begins at zero and would hardly move.
    return optax.chain(
        optax.adafactor(None, multiply_by_parameter_scale=False),
        optax.scale(-1.0),  # optax.adafactor turns the sign already
        *([optax.add_decayed_weights(decay, _chosen(on))] if decay else []),
        optax.scale_by_learning_rate(1.0),
    )


def _lion(decay: float, on: Decay) -> optax.GradientTransformation:
    return optax.lion(1.0, weight_decay=decay, mask=_chosen(on))


def _muon(decay: float, on: Decay) -> optax.GradientTransformation:
    numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    muon = contrib.muon(
        1.0,
        weight_decay=decay,
        muon_weight_dimension_numbers=lambda params: dict.fromkeys(params, numbers),
        consistent_rms=0.2,  # updates as large as Adam's, so that its learning rates serve (Moonlight, 2502.16982)
    )
    rules = {"matrix": muon, "other": optax.adamw(1.0, weight_decay=0.0)}
    return optax.partition(rules, lambda params: {key: "matrix" if on.get(key, False) else "other" for key in params})


def _sgd(decay: float, on: Decay) -> optax.GradientTransformation:
    return optax.chain(
        *([optax.add_decayed_weights(decay, _chosen(on))] if decay else []), optax.sgd(1.0, momentum=0.9)
    )


OPTIMIZERS: dict[str, Rule] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


def _chosen(on: Decay) -> Callable[[Any], dict[str, bool]]:
    return lambda params: {key: on.get(key, False) for key in params}


def matrices(model: Any, keys: Iterable[str]) -> dict[str, bool]:
    """Which of the arrays `keys` of `model` have two axes or more in each layer: weights, not biases, scales, gates."""
    stacked = {node.name: node.length for node in paths.nodes(model) if node.length is not None}
    arrays = jpeft.partition(model).adapter
    inside = {key: any(key.startswith(f"{name}/") for name in stacked) for key in keys}
    return {key: arrays[key].ndim - stack >= 2 for key, stack in inside.items()}


def schedule(training: TrainingConfig, steps: int, peak: float) -> optax.Schedule:
    """The learning rate by optimizer step: warm-up from zero to `peak`, then constant or down to zero."""
    warmup = round(training.warmup * steps)
    rest = max(1, steps - warmup)
    after: optax.Schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }[training.schedule]()
    if not warmup:
        return after
    # Step 0 already moves: the rate rises from peak / warmup, not from nothing.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def settings(training: TrainingConfig, labels: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """(peak learning rate, weight decay) of each group that `labels` names, by group.

    Raises JpeftError if settings are given for a group that the model does not have.
    """
    there = sorted(set(labels.values()))
    given = {group: dict(values) for group, values in (training.groups or {}).items()}
    if training.head_learning_rate is not None:
        if "head" not in there:
            raise JpeftError(
                f"training.head_learning_rate: nothing that trains is a new head; the groups are {', '.join(there)}"
            )
        given.setdefault("head", {}).setdefault("learning_rate", training.head_learning_rate)
    for group in given:
        if group not in there:
            raise JpeftError(
                f"training.groups: nothing that trains is in a group {group!r}; the groups are {', '.join(there)} "
                f"(nearest: {nearest(group, there, 1)[0]})"
            )
    return {
        group: (
            given.get(group, {}).get("learning_rate", training.learning_rate),
            given.get(group, {}).get("weight_decay", training.weight_decay),
        )
        for group in there
    }


def rates(training: TrainingConfig, steps: int, labels: Mapping[str, str], at: np.ndarray) -> dict[str, np.ndarray]:
    """The learning rate of each group in the steps `at` [N] of `steps`: float32 [N].

    It is that before a method makes something of it (LoRA+ scales B's).
    """
    return {
        group: np.broadcast_to(np.asarray(schedule(training, steps, peak)(jnp.asarray(at)), np.float32), at.shape)
        for group, (peak, _) in settings(training, labels).items()
    }


def _at_the_rate_of(group: str) -> optax.GradientTransformationExtraArgs:
    """Updates times the rate that `update(..., rates={group: rate})` is given."""

    def update(updates: Any, state: Any, params: Any = None, *, rates: Mapping[str, Any], **_: Any) -> Any:
        return optax.tree.scale(rates[group], updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimizer as a value: equal recipes make equal programs.

    rule: of `OPTIMIZERS`. groups: (array of the adapter, its group). decays: (group, weight decay). matrices: the
    arrays that decay, and that Muon orthogonalises. clip: of the global norm. steps: of the run, for methods that plan
    by it.
    """

    rule: str
    groups: tuple[tuple[str, str], ...]
    decays: tuple[tuple[str, float], ...]
    matrices: frozenset[str]
    clip: float | None
    steps: int

    def __call__(self, model: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer over the adapter of `model`, with what its methods ask for: `update(..., rates=)`."""
        return optax.with_extra_args_support(jpeft.optimizer(model, self.plain(), total_steps=self.steps))

    def plain(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer without what methods ask for."""
        rule, on = OPTIMIZERS[self.rule], dict.fromkeys(self.matrices, True)
        rules = {group: optax.chain(rule(decay, on), _at_the_rate_of(group)) for group, decay in self.decays}
        clipping = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        return optax.with_extra_args_support(optax.chain(*clipping, optax.partition(rules, dict(self.groups))))


def recipe(training: TrainingConfig, steps: int, labels: Mapping[str, str], is_matrix: Mapping[str, bool]) -> Recipe:
    """The optimizer that `training` asks for, `labels` giving the group of each array of the adapter.

    is_matrix: which of them are (`matrices`). Raises JpeftError if settings are given for a group that the model does
    not have.
    """
    return Recipe(
        rule=training.optimizer,
        groups=tuple(labels.items()),
        decays=tuple((group, decay) for group, (_, decay) in settings(training, labels).items()),
        matrices=frozenset(key for key, matrix in is_matrix.items() if matrix),
        clip=training.clip,
        steps=steps,
    )
