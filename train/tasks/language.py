"""What all language models share: the loss over the tokens that are learnt, computed where they are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.losses import token_losses
from train.batches import IGNORED, rounded
from train.examples import Example
from train.step import inputs
from train.tasks.task import Arrays, Task


class LanguageTask(Task):
    """Cross-entropy of the learnt tokens of each row, each predicted where the token before it stands."""

    head = "causal-lm"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity")

    @staticmethod
    def width(examples: Sequence[Example]) -> int:
        return rounded(max((int(example.targets.sum()) for example in examples), default=1) or 1)

    @staticmethod
    def targets(examples: Sequence[Example], length: int, width: int) -> dict[str, np.ndarray]:
        """positions: [B, K] int32, where a learnt token is predicted. labels: [B, K] int32, that token, or `IGNORED`.

        K is `width`, or `length` - 1 if that is less. Logits are then computed for what is learnt only.
        """
        shape = (len(examples), min(width, length - 1))
        made = {"positions": np.zeros(shape, np.int32), "labels": np.full(shape, IGNORED, np.int32)}
        for at, example in enumerate(examples):
            learnt = np.flatnonzero(example.targets)
            made["positions"][at, : len(learnt)] = learnt - 1
            made["labels"][at, : len(learnt)] = example.ids[learnt]
        return {**made, "weights": np.sum(made["labels"] != IGNORED, axis=1).astype(np.float32)}

    @staticmethod
    def losses(model: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        hidden = model.hidden(**inputs(batch))
        learnt = jnp.take_along_axis(hidden, batch["positions"][..., None], axis=1)  # [B, K, D]
        each = token_losses(model, learnt, batch["labels"])  # [B, K]
        return jnp.sum(each, axis=1), jnp.zeros(each.shape[:1], jnp.int32)
