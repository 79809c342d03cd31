"""The optimizer of a run: which rule, and for each group of arrays its learning rate and weight decay."""

from __future__ import annotations

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
Rule = Callable[[optax.Schedule, float, Decay], optax.GradientTransformation]


def _adamw(rate: optax.Schedule, decay: float, on: Decay) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=decay, mask=_chosen(on))


def _adamw8bit(rate: optax.Schedule, decay: float, on: Decay) -> optax.GradientTransformation:
    return optax.chain(
        jpeft.quant.scale_by_adam8bit(),
        *([optax.add_decayed_weights(decay, _chosen(on))] if decay else []),
        optax.scale_by_learning_rate(rate),
    )


def _adafactor(rate: optax.Schedule, decay: float, on: Decay) -> optax.GradientTransformation:
    # The decay that optax.adafactor offers is not multiplied by the learning rate; this one is, as everywhere here.
    # Updates are not scaled by the size of the parameter: LoRA's B begins at zero and would hardly move.
    return optax.chain(
        optax.adafactor(None, multiply_by_parameter_scale=False),
        optax.scale(-1.0),  # optax.adafactor turns the sign already
        *([optax.add_decayed_weights(decay, _chosen(on))] if decay else []),
        optax.scale_by_learning_rate(rate),
    )


def _lion(rate: optax.Schedule, decay: float, on: Decay) -> optax.GradientTransformation:
    return optax.lion(rate, weight_decay=decay, mask=_chosen(on))


def _muon(rate: optax.Schedule, decay: float, on: Decay) -> optax.GradientTransformation:
    numbers = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    muon = contrib.muon(
        rate,
        weight_decay=decay,
        muon_weight_dimension_numbers=lambda params: dict.fromkeys(params, numbers),
        consistent_rms=0.2,  # updates as large as Adam's, so that its learning rates serve (Moonlight, 2502.16982)
    )
    rules = {"matrix": muon, "other": optax.adamw(rate, weight_decay=0.0)}
    return optax.partition(rules, lambda params: {key: "matrix" if on.get(key, False) else "other" for key in params})


def _sgd(rate: optax.Schedule, decay: float, on: Decay) -> optax.GradientTransformation:
    return optax.chain(
        *([optax.add_decayed_weights(decay, _chosen(on))] if decay else []), optax.sgd(rate, momentum=0.9)
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


def rates(training: TrainingConfig, steps: int, labels: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The learning rate of each group by step, float32 [steps], before what a method makes of it (LoRA+ scales B's)."""
    numbers = jnp.arange(steps)
    return {
        group: np.broadcast_to(np.asarray(schedule(training, steps, peak)(numbers), np.float32), (steps,))
        for group, (peak, _) in settings(training, labels).items()
    }


def optimizer(
    training: TrainingConfig, steps: int, labels: Mapping[str, str], is_matrix: Mapping[str, bool]
) -> optax.GradientTransformation:
    """The optimizer over the adapter, `labels` giving the group of each of its arrays.

    is_matrix: which of them are (`matrices`); only they decay, and only they are orthogonalised by Muon. Raises
    JpeftError if settings are given for a group that the model does not have.
    """
    rule = OPTIMIZERS[training.optimizer]
    rules = {
        group: rule(schedule(training, steps, peak), decay, is_matrix)
        for group, (peak, decay) in settings(training, labels).items()
    }
    parts = [optax.partition(rules, dict(labels))]
    return optax.chain(*([optax.clip_by_global_norm(training.clip)] if training.clip else []), *parts)
