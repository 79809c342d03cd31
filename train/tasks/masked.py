"""Masked language modelling on plain text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jpeft.errors import JpeftError
from train.batches import IGNORED, arrays, rounded
from train.examples import Example, Reader
from train.files import Rows
from train.step import inputs
from train.tasks.language import LanguageTask
from train.tasks.task import Read, text_of

if TYPE_CHECKING:
    from train.session import Run

SHARE = 0.15  # of the tokens are predicted


@dataclasses.dataclass(frozen=True)
class Masking:
    """What masks an example need: the mask's id, the size of the vocabulary, and which tokens may be chosen."""

    mask: int
    vocabulary: int
    places: np.ndarray

    @property
    def count(self) -> int:
        """How many tokens are chosen."""
        return max(1, round(SHARE * len(self.places)))


class MaskedLanguage(LanguageTask):
    """Cross-entropy of 15% of the tokens (Devlin et al. 2019, arXiv:1810.04805).

    Of those chosen 80% are replaced with the mask, 10% with a random token, and 10% stay. Which they are is drawn anew
    in each epoch, from the run's seed, the epoch and the row's number; of held-out rows it is always the same.
    """

    name = "masked-language"
    head = "masked-lm"
    required = ("text",)
    draws = True

    def reader(self, rows: Rows, reader: Reader) -> Read:
        if reader.tokenizer.mask_token_id is None:
            raise JpeftError("the tokenizer has no mask token, which model.task masked-lm needs")

        def read(row: dict[str, Any], index: int) -> list[Example]:
            return [
                dataclasses.replace(piece, label=Masking(reader.tokenizer.mask_token_id, len(reader.tokenizer), places))
                for piece, places in reader.pieces(text_of(row[str(self.data.text)]), index)
            ]

        return read

    @staticmethod
    def drawn(example: Example, random: np.random.Generator) -> Example:
        masking: Masking = example.label
        chosen = np.sort(random.choice(masking.places, masking.count, replace=False))
        share = random.random(masking.count)
        replaced = np.where(share < 0.8, masking.mask, random.integers(masking.vocabulary, size=masking.count))
        ids, targets = example.ids.copy(), np.zeros(len(example), bool)
        ids[chosen] = np.where(share < 0.9, replaced, ids[chosen])
        targets[chosen] = True
        return dataclasses.replace(example, ids=ids, targets=targets, label=example.ids)

    @staticmethod
    def width(examples: Sequence[Example]) -> int:
        return rounded(max(example.label.count for example in examples))

    @staticmethod
    def targets(examples: Sequence[Example], length: int, width: int) -> dict[str, np.ndarray]:
        """positions: [B, K] int32, where the chosen tokens stand; labels: [B, K] int32, what they were."""
        shape = (len(examples), min(width, length))
        made = {"positions": np.zeros(shape, np.int32), "labels": np.full(shape, IGNORED, np.int32)}
        for at, example in enumerate(examples):
            chosen = np.flatnonzero(example.targets)
            made["positions"][at, : len(chosen)] = chosen
            made["labels"][at, : len(chosen)] = example.label[chosen]
        return {**made, "weights": np.sum(made["labels"] != IGNORED, axis=1).astype(np.float32)}

    def answers(self, run: Run, prompts: Sequence[str], **settings: Any) -> Iterator[str]:
        """The text with its masks filled in, each with the likeliest token."""
        tokenizer = run.reader.tokenizer
        for prompt in prompts:
            pieces = run.reader.pieces(prompt, 0)
            if not pieces or tokenizer.mask_token_id not in pieces[0][0].ids:
                raise JpeftError(f"--prompt: {prompt!r} has no {tokenizer.mask_token} to fill in")
            example = pieces[0][0]
            found = np.asarray(run.model(**inputs(arrays([example], len(example), 1))).argmax(-1))[0]
            masked = example.ids == tokenizer.mask_token_id
            yield tokenizer.decode(np.where(masked, found, example.ids), skip_special_tokens=True)
