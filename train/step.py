"""One optimizer step as a pure function.

Everything a step depends on is an argument: adapter, optimizer state, frozen arrays, batch, key, step number, learning
rates. So the runs of a method on a model, whatever their seeds and rates, share one compiled program in a process.
Losses are sums over what is learnt, divided once by the count of the whole step, so the same rows give the same update
however they are cut into micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

import jpeft
from train import placing

if TYPE_CHECKING:
    from train.tasks.task import Task

Arrays = dict[str, jax.Array]

_KEPT = 8  # steps and scorers, each with its programs


def inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with."""
    names = ("input_ids", "attention_mask", "token_type_ids", "segment_ids")
    return {name: batch[name] for name in names if name in batch}


Losses = Callable[[Any, Arrays], tuple[jax.Array, jax.Array]]


def make_step(
    graphdef: Any,
    task: Task | type[Task],
    optimizer: Callable[[Any], optax.GradientTransformationExtraArgs],
    layouts: tuple[Any, Any] | None = None,
) -> Callable[..., Any]:
    """The jitted step: `(adapter, state, buffers, frozen, batch, key, number, rates) -> (adapter, state, metrics)`.

    optimizer: makes the optimizer for a model; a value (`train.optimizers.Recipe`), by which programs are found again.
    rates: the learning rate of each group, float32 scalars. A state that lies in the memory of the host (`layouts`) is
    fetched for its update.

    batch: arrays [A, B, ...], A micro-batches of B rows, as `task` makes and reads them. key: of the run; dropout uses
    key, step and micro-batch. The adapter and the optimizer state are donated; layouts: their shardings, where they are
    spread over devices. metrics: loss (the mean over what is learnt, without the methods' penalties), gradient norm.
    """

    lie, tree = jax.tree.flatten(layouts)
    return _kept_step(graphdef, task.losses, optimizer, tuple(lie), tree)


@functools.lru_cache(maxsize=_KEPT)
def _kept_step(graphdef: Any, losses: Losses, optimizer: Any, lie: tuple[Any, ...], tree: Any) -> Callable[..., Any]:
    """lie, tree: the layouts, flattened."""
    step = _step(graphdef, losses, optimizer, fetch=any(at.memory_kind == placing.HOST for at in lie))
    out = (*tree.unflatten(lie), None) if lie else None
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out)


def _step(graphdef: Any, losses: Losses, optimizer: Any, *, fetch: bool) -> Callable[..., Any]:
    def fetched(state: Any) -> Any:
        return jax.device_put(state, jax.memory.Space.Device) if fetch else state

    def step(
        adapter: Arrays,
        state: Any,
        buffers: Arrays,
        frozen: Arrays,
        batch: Arrays,
        key: jax.Array,
        number: jax.Array,
        rates: Mapping[str, jax.Array],
    ) -> tuple[Arrays, Any, dict[str, jax.Array]]:
        count = jnp.sum(batch["weights"])
        count = jnp.where(count > 0, count, 1.0)
        own = jax.random.fold_in(key, number)

        parts = batch["input_ids"].shape[0]

        def share(adapter: Arrays, index: jax.Array, micro: Arrays) -> tuple[jax.Array, jax.Array]:
            model = jpeft.combine(graphdef, adapter, buffers, frozen, dropout=jax.random.fold_in(own, index))
            loss = jnp.sum(losses(model, micro)[0]) / count
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
        transform = optimizer(jpeft.combine(graphdef, adapter, buffers, frozen))
        updates, state = transform.update(grads, fetched(state), adapter, rates=rates)
        adapter = optax.apply_updates(adapter, updates)
        return adapter, state, {"loss": loss, "gradient_norm": optax.tree.norm(grads)}

    return step


def make_scorer(graphdef: Any, task: Task | type[Task]) -> Callable[..., Any]:
    """The jitted evaluation: `(adapter, buffers, frozen, batch) -> (losses [B], predictions [B, ...])`."""
    return _kept_scorer(graphdef, task.losses)


@functools.lru_cache(maxsize=_KEPT)
def _kept_scorer(graphdef: Any, losses: Losses) -> Callable[..., Any]:
    def score(adapter: Arrays, buffers: Arrays, frozen: Arrays, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        return losses(jpeft.combine(graphdef, adapter, buffers, frozen), batch)

    return jax.jit(score)
