"""Prompts for an encoder and completions for its decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.losses import token_losses
from train.batches import IGNORED, rounded
from train.examples import Example, Reader
from train.files import Rows
from train.generation import generate_texts
from train.step import inputs
from train.tasks.completion import Completion
from train.tasks.task import Arrays, Read

if TYPE_CHECKING:
    from train.session import Run


class Seq2Seq(Completion):
    """Cross-entropy of the completion, which the decoder reads behind its start token; generated with a cache.

    An example's label is the completion's ids, the end token among them.
    """

    name = "seq2seq"
    head = "seq2seq-lm"

    def reader(self, rows: Rows, reader: Reader) -> Read:
        return lambda row, index: reader.pair(self.prompt(row), self.completion(row), index)

    @staticmethod
    def choice(reader: Reader, prompt: str, completion: str) -> list[Example]:
        return reader.pair(prompt, completion, 0)

    @staticmethod
    def prompt_ids(example: Example) -> np.ndarray:
        return example.ids

    @staticmethod
    def learnt(example: Example) -> int:
        return len(example.label)

    @staticmethod
    def width(examples: Sequence[Example]) -> int:
        return rounded(max(len(example.label) for example in examples))

    @staticmethod
    def targets(examples: Sequence[Example], length: int, width: int) -> dict[str, np.ndarray]:
        """labels: [B, K] int32, the decoder's tokens; K is `width`."""
        labels = np.full((len(examples), width), IGNORED, np.int32)
        for at, example in enumerate(examples):
            labels[at, : len(example.label)] = example.label
        return {"labels": labels, "weights": np.sum(labels != IGNORED, axis=1).astype(np.float32)}

    @staticmethod
    def losses(model: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        hidden = model.hidden(**inputs(batch), decoder_input_ids=model.shift_right(batch["labels"]))  # [B, K, D]
        each = token_losses(model, hidden, batch["labels"])
        return jnp.sum(each, axis=1), jnp.zeros(each.shape[:1], jnp.int32)

    def answers(self, run: Run, prompts: Sequence[str], *, raw: bool = False, **settings: Any) -> Iterator[str]:
        ids = [run.reader.source(self.filled(prompt, raw)) for prompt in prompts]
        yield from generate_texts(run.model, run.reader, ids, **settings)
