"""A tag for each word, such as names in BIO tags or parts of speech."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jpeft.errors import JpeftError
from train.batches import IGNORED, arrays, edges
from train.examples import Example, Reader
from train.files import Rows, kind_of
from train.step import inputs
from train.tasks.classification import given_labels, label_numbers, labels_in
from train.tasks.task import Arrays, Read, Task

if TYPE_CHECKING:
    from train.session import Run

OUTSIDE = "O"  # the tag of words that belong to no span, and of those that the model does not see


class TokenClassification(Task):
    """Cross-entropy of the tags, each at the first sub-word of its word (Devlin et al. 2019, arXiv:1810.04805)."""

    name = "token-classification"
    head = "token-classification"
    required = ("tags", "tokens")
    settings = ("labels",)
    lists = ("tags", "tokens")
    measure = "tags"
    metrics = ("span_f1", "token_accuracy")
    asked_as = "text"

    @property
    def default_metrics(self) -> tuple[str, ...]:
        spans = all(label == OUTSIDE or label[:2] in ("B-", "I-") for label in self.labels)
        return self.metrics if spans else ("token_accuracy",)

    def find_labels(self, train: Rows) -> tuple[str, ...]:
        if self.data.labels is not None:
            return given_labels(self.data.labels)
        names = self._names(train)
        if names:
            return tuple(names)
        tags = [tag for row in train.dataset[str(self.data.tags)] for tag in row or ()]
        return labels_in(tags, str(self.data.tags), train.name)

    def _names(self, rows: Rows) -> Sequence[str] | None:
        """The names that the numbers of a column stand for (`datasets.ClassLabel`)."""
        feature = rows.dataset.features[str(self.data.tags)]
        return getattr(getattr(feature, "feature", None), "names", None)

    def check(self, rows: Rows) -> None:
        words, tags = self._fields(rows)
        for index, row in enumerate(rows.dataset):
            tags(row, index)
            words(row, index)

    def _fields(
        self, rows: Rows
    ) -> tuple[Callable[[dict[str, Any], int], list[str]], Callable[[dict[str, Any], int], list[int]]]:
        """The functions (row, its number) -> words, and -> the numbers of their tags."""
        tokens, tags = str(self.data.tokens), str(self.data.tags)
        number = label_numbers(self.labels, self._names(rows), rows)

        def words(row: dict[str, Any], index: int) -> list[str]:
            odd = next((word for word in row[tokens] or () if not isinstance(word, str)), None)
            if odd is not None or None in (row[tokens] or ()):
                raise JpeftError(f"{rows.place(index)}: column {tokens!r} has {kind_of(odd)} among its words, not text")
            return list(row[tokens] or ())

        def numbers(row: dict[str, Any], index: int) -> list[int]:
            found, wanted = (len(row[column] or ()) for column in (tags, tokens))
            if found != wanted:
                raise JpeftError(
                    f"{rows.place(index)}: {wanted} words in column {tokens!r}, {found} tags in column {tags!r}; each "
                    "word has one tag"
                )
            return [number(tag, index) for tag in row[tags] or ()]

        return words, numbers

    def reader(self, rows: Rows, reader: Reader) -> Read:
        words, tags = self._fields(rows)
        return lambda row, index: reader.tagged(words(row, index), tags(row, index), index)

    @staticmethod
    def targets(examples: Sequence[Example], length: int, width: int) -> dict[str, np.ndarray]:
        labels = np.full((len(examples), length), IGNORED, np.int32)
        for at, example in enumerate(examples):
            labels[at, : len(example)] = example.label.tags
        return {"labels": labels, "weights": np.sum(labels != IGNORED, axis=1).astype(np.float32)}

    @staticmethod
    def losses(model: Any, batch: Arrays) -> tuple[jax.Array, jax.Array]:
        logits = model(**inputs(batch)).astype(jnp.float32)  # [B, T, C]
        learnt = batch["labels"] != IGNORED
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(learnt, batch["labels"], 0))
        return jnp.sum(each * learnt, axis=1), jnp.argmax(logits, -1)

    def guess(self, output: np.ndarray, example: Example, row: Mapping[str, Any]) -> list[str]:
        found = [OUTSIDE] * len(row[str(self.data.tokens)])
        for at in np.flatnonzero(example.label.tags != IGNORED):
            found[example.label.words[at]] = self.labels[output[at]]
        return found

    def right(self, example: Example, row: Mapping[str, Any]) -> list[str]:
        return [self.labels[number] for number in example.label.all]

    def shown(self, value: Sequence[str], row: Mapping[str, Any]) -> str:
        return spelled(row[str(self.data.tokens)], value)

    def asked(self, row: Mapping[str, Any]) -> str:
        return " ".join(row[str(self.data.tokens)])

    def example_prompt(self, row: Mapping[str, Any]) -> tuple[str, bool] | None:
        return self.asked(row), False

    def answers(self, run: Run, prompts: Sequence[str], **settings: Any) -> Iterator[str]:
        rows = [prompt.split() for prompt in prompts]
        examples = [run.reader.tagged(words, [0] * len(words), at)[0] for at, words in enumerate(rows)]
        length = edges([len(example) for example in examples], 1)[-1]
        found = np.asarray(run.model(**inputs(arrays(examples, length, len(rows)))).argmax(-1))
        for words, example, output in zip(rows, examples, found, strict=True):
            yield spelled(words, self.guess(output, example, {str(self.data.tokens): words}))


def spelled(words: Sequence[str], tags: Sequence[str]) -> str:
    """The spans that BIO tags make of words, `New York [place], Ada [person]`; of other tags, `word/tag` for each."""
    if any(tag != OUTSIDE and tag[:2] not in ("B-", "I-") for tag in tags):
        return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))
    spans: list[tuple[list[str], str]] = []
    before = OUTSIDE
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("I-") and before[2:] == tag[2:]:
            spans[-1][0].append(word)
        elif tag != OUTSIDE:
            spans.append(([word], tag[2:]))
        before = tag
    return ", ".join(f"{' '.join(inside)} [{kind}]" for inside, kind in spans) or "-"
