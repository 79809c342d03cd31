"""Prompts and completions, of which the completion is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jpeft.errors import JpeftError
from train.examples import Example, Reader
from train.files import Rows
from train.generation import generate_texts
from train.tasks.language import LanguageTask
from train.tasks.task import Read
from train.templates import Template

if TYPE_CHECKING:
    from train.schema import DataConfig
    from train.session import Run


class Completion(LanguageTask):
    """A column or template of columns for each of the two; scored by what the model writes after the prompt."""

    name = "completion"
    required = ("completion", "prompt")
    measure = "texts"
    metrics = ("exact_match", "loss", "perplexity")
    writes = True

    def __init__(self, data: DataConfig):
        super().__init__(data)
        self.prompt, self.completion = (
            Template(str(data.prompt), "prompt"),
            Template(str(data.completion), "completion"),
        )

    def columns(self) -> dict[str, tuple[str, ...]]:
        return {"prompt": self.prompt.columns, "completion": self.completion.columns}

    def check(self, rows: Rows) -> None:
        for key, columns in self.columns().items():
            for column in columns:
                empty = next((i for i, value in enumerate(rows.dataset[column]) if value is None), None)
                if empty is not None:
                    raise JpeftError(f"{rows.place(empty)}: column {column!r}, which data.{key} uses, is empty")

    def reader(self, rows: Rows, reader: Reader) -> Read:
        return lambda row, index: reader.completion(self.prompt(row), self.completion(row), index)

    @staticmethod
    def choice(reader: Reader, prompt: str, completion: str) -> list[Example]:
        """The example of a prompt with one of several completions, by whose loss it is chosen."""
        return reader.completion(prompt, completion, 0)

    @staticmethod
    def prompt_ids(example: Example) -> np.ndarray:
        """What an answer follows: the same ids, cut in the same way, as in training."""
        return example.ids[: max(1, int(np.argmax(example.targets)))]

    @staticmethod
    def learnt(example: Example) -> int:
        """How many tokens the right answer has, its end among them."""
        return int(example.targets.sum())

    def choices(self, train: Rows) -> tuple[str, ...]:
        """Every completion that occurs in the training rows."""
        return tuple(dict.fromkeys(self.completion(row) for row in train.dataset))

    def right(self, example: Example, row: Mapping[str, Any]) -> str:
        return self.completion(row)

    def asked(self, row: Mapping[str, Any]) -> str:
        return self.prompt(row)

    def example_prompt(self, row: Mapping[str, Any]) -> tuple[str, bool] | None:
        columns = self.prompt.columns
        return (str(row[columns[0]]), False) if len(columns) == 1 else (self.prompt(row), True)

    def answers(self, run: Run, prompts: Sequence[str], *, raw: bool = False, **settings: Any) -> Iterator[str]:
        ids = [run.reader.prompt(self.filled(prompt, raw)) for prompt in prompts]
        yield from generate_texts(run.model, run.reader, ids, **settings)

    def filled(self, prompt: str, raw: bool) -> str:
        """`prompt` in the template, unless it is the whole already. Raises JpeftError if the template needs more."""
        if raw:
            return prompt
        if len(self.prompt.columns) > 1:
            raise JpeftError(
                f"the run's template {self.data.prompt!r} has several columns; give the whole prompt with --raw"
            )
        return self.prompt({self.prompt.columns[0]: prompt})
