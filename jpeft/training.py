"""What a method asks of a training loop: terms of the loss, and changes to the optimizer.

    tx = jpeft.optimizer(model, optax.adamw(1e-4))
    loss = task_loss(model, batch) + jpeft.penalty(model)

For a model whose methods ask for nothing, `tx` is the same optimizer and the penalty is 0, so a loop that always writes
these two lines is right for every method.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jpeft import surgery
from jpeft.methods.method import applied
from jpeft.wrapper import Wrapper


def penalty(model: nnx.Module) -> jax.Array:
    """The sum of what the model's wrappers add to the loss, a float32 scalar; differentiable, 0 for most methods."""
    terms = [module.penalty() for _, module in surgery.modules(model) if isinstance(module, Wrapper)]
    return sum((term for term in terms if term is not None), jnp.float32(0))


def optimizer(model: nnx.Module, tx: optax.GradientTransformation, *, total_steps: int | None = None) -> Any:
    """`tx` with what the model's methods ask of an optimizer of the adapter `partition(model).adapter`.

    total_steps: how many steps the training has, for methods that plan by it (AdaLoRA).
    """
    for method in applied(model):
        tx = method.optimizer(model, tx, total_steps)
    return tx
