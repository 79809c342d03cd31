"""What runs of one configuration have in common: rows, tokenizer, base model, tokenised examples.

Each part is made when it is first asked for and stays, so that a comparison reads and tokenises once for all its runs.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from jpeft.errors import JpeftError
from train import data as task_data
from train import placing, session
from train.data import TaskData
from train.examples import Reader
from train.schema import Config
from train.tasks import task_of


class Base:
    """The tokenizer and the model of a configuration.

    abstract: the model has shapes instead of arrays. mesh, rules: over which it is spread, and how.
    """

    def __init__(self, config: Config, *, abstract: bool = False):
        self._config, self.abstract = config, abstract
        self.mesh = placing.mesh_of(config)
        self.rules = None if self.mesh is None else placing.rules_of(config)
        self._has_head = task_of(config.data, config.model.task).outputs is not None
        self._tokenizer: Any = None
        self._model: tuple[int | None, Any] | None = None

    def tokenizer(self) -> Any:
        """The tokenizer that the configuration names."""
        if self._tokenizer is None:
            self._tokenizer = session.tokenizer(self._config)
        return self._tokenizer

    def model(self, seed: int) -> Any:
        """The model; a new head, where the task has one, is that of `seed`. The last model asked for is kept."""
        made_of = seed if self._has_head else None
        if self._model is None or self._model[0] != made_of:
            self._model = None  # two at once may be more than fits
            training = self._config.training.model_copy(update={"seed": seed})
            config = self._config.model_copy(update={"training": training})
            if self.abstract:
                self._model = made_of, session.abstract_model(config)
            else:
                self._model = made_of, session.base_model(config, self.mesh, self.rules)
        return self._model[1]

    def unquantized(self, seed: int) -> Any:
        """The model as it was before `model.base`, read anew."""
        model = self._config.model.model_copy(update={"base": None})
        training = self._config.training.model_copy(update={"seed": seed})
        config = self._config.model_copy(update={"model": model, "training": training})
        return session.base_model(config, self.mesh, self.rules)


class Materials:
    """The parts of runs of `config` that neither method nor rates change.

    data: `config.data` with its labels. train_rows, test_rows: to train on and held out. base: what is trained upon.
    """

    def __init__(self, config: Config, *, abstract: bool = False):
        self.data, self.train_rows, self.test_rows = task_data.read(config.data, config.model.task)
        self.task = task_of(self.data, config.model.task)
        self.base = Base(config.model_copy(update={"data": self.data}), abstract=abstract)
        self._examples: dict[tuple[int, bool], TaskData] = {}

    def validating(self, size: float) -> Materials:
        """The same base with the training rows alone: `size` of them (a number, or a fraction) are the held-out ones.

        `data.seed` chooses them. Raises JpeftError if none are left to train on.
        """
        total = len(self.train_rows)
        count = int(size) if size >= 1 else max(1, round(size * total))
        if count >= total:
            raise JpeftError(
                f"validation_size: {count} of the {total} training rows leave none to train on; give fewer"
            )
        order = np.random.Generator(np.random.PCG64([self.data.seed, total, 1])).permutation(total)
        made = copy.copy(self)
        made.train_rows, made.test_rows = self.train_rows.select(order[count:]), self.train_rows.select(order[:count])
        made._examples = {}
        return made

    def reader(self, model: Any) -> Reader:
        """Reads texts as long as the adapted `model` can take them."""
        limit = min(self.data.max_length, session.context(model) or self.data.max_length)
        return Reader(self.base.tokenizer(), limit, types=session.takes_types(model))

    def examples(self, model: Any) -> TaskData:
        """The tokenised rows for the adapted `model`. Raises JpeftError if it cannot learn the task."""
        self.task.check_model(model)
        reader = self.reader(model)
        key = reader.max_length, reader.types
        if key not in self._examples:
            rows = self.train_rows, self.test_rows
            self._examples[key] = task_data.prepare(self.task, *rows, reader.tokenizer, key[0], types=key[1])
        return self._examples[key]
