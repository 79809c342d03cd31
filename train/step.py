"""One optimizer step as a pure function, and the optimizer it uses.

Everything a step depends on is an argument: adapter, optimizer state, frozen arrays, batch, key, step number. Losses
are sums over what is learnt, divided once by the count of the whole step, so the same rows give the same update however
they are cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft.errors import JpeftError
from train.schema import TrainingConfig

if TYPE_CHECKING:
    from train.tasks.task import Task

Arrays = dict[str, jax.Array]


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with."""
    names = ("input_ids", "attention_mask", "token_type_ids", "segment_ids")
    return {name: batch[name] for name in names if name in batch}


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


def peaks(training: TrainingConfig, labels: Mapping[str, str]) -> dict[str, float]:
    """The peak learning rate of each group that `labels` names, by group."""
    head = training.head_learning_rate or training.learning_rate
    return {group: head if group == "head" else training.learning_rate for group in sorted(set(labels.values()))}


def rates(training: TrainingConfig, steps: int, labels: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The learning rate of each group by step, float32 [steps], before what a method makes of it (LoRA+ scales B's)."""
    numbers = jnp.arange(steps)
    return {
        group: np.broadcast_to(np.asarray(schedule(training, steps, peak)(numbers), np.float32), (steps,))
        for group, peak in peaks(training, labels).items()
    }


def optimizer(training: TrainingConfig, steps: int, labels: Mapping[str, str]) -> optax.GradientTransformation:
    """AdamW over the adapter, `labels` giving the group of each of its arrays; a head has its own rate.

    Raises JpeftError if a rate is given for a head that the model does not have.
    """
    if training.head_learning_rate is not None and "head" not in labels.values():
        groups = ", ".join(sorted(set(labels.values())))
        raise JpeftError(f"training.head_learning_rate: nothing that trains is a new head; the groups are {groups}")

    def rule(peak: float) -> optax.GradientTransformation:
        return optax.adamw(schedule(training, steps, peak), weight_decay=training.weight_decay)

    rules = {group: rule(peak) for group, peak in peaks(training, labels).items()}
    parts = [optax.partition(rules, dict(labels))]
    return optax.chain(*([optax.clip_by_global_norm(training.clip)] if training.clip else []), *parts)


def make_step(graphdef: Any, task: Task | type[Task], transform: optax.GradientTransformation) -> Callable[..., Any]:
    """The jitted step: `(adapter, state, buffers, frozen, batch, key, number) -> (adapter, state, metrics)`.

    batch: arrays [A, B, ...], A micro-batches of B rows, as `task` makes and reads them. key: of the run; dropout uses
    key, step and micro-batch. The adapter and the optimizer state are donated. metrics: loss (the mean over what is
    learnt, without the methods' penalties), gradient norm.
    """

    def step(
        adapter: Arrays, state: Any, buffers: Arrays, frozen: Arrays, batch: Arrays, key: jax.Array, number: jax.Array
    ) -> tuple[Arrays, Any, dict[str, jax.Array]]:
        count = jnp.sum(batch["weights"])
        count = jnp.where(count > 0, count, 1.0)
        own = jax.random.fold_in(key, number)

        parts = batch["input_ids"].shape[0]

        def share(adapter: Arrays, index: jax.Array, micro: Arrays) -> tuple[jax.Array, jax.Array]:
            model = jpeft.combine(graphdef, adapter, buffers, frozen, dropout=jax.random.fold_in(own, index))
            loss = jnp.sum(task.losses(model, micro)[0]) / count
            return loss + jpeft.penalty(model) / parts, loss

        def grad(index: jax.Array, micro: Arrays) -> tuple[jax.Array, Arrays]:
            (_, loss), grads = jax.value_and_grad(share, has_aux=True)(adapter, index, micro)
            return loss, grads

        def body(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad(*xs)), None

        if parts == 1:
            loss, grads = grad(jnp.int32(0), {k: v[0] for k, v in batch.items()})
        else:
            start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, adapter))
            (loss, grads), _ = jax.lax.scan(body, start, (jnp.arange(parts), batch))
        updates, state = transform.update(grads, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        return adapter, state, {"loss": loss, "gradient_norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=(0, 1))


def make_scorer(graphdef: Any, task: Task | type[Task]) -> Callable[..., Any]:
    """The jitted evaluation: `(adapter, buffers, frozen, batch) -> (losses [B], predictions [B, ...])`."""

    def score(adapter: Arrays, buffers: Arrays, frozen: Arrays, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        return task.losses(jpeft.combine(graphdef, adapter, buffers, frozen), batch)

    return jax.jit(score)
