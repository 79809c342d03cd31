"""What runs of one configuration have in common: rows, tokenizer, base model, tokenised examples.

Each part is made when it is first asked for and stays, so that a comparison reads and tokenises once for all its runs.
"""

from __future__ import annotations

from typing import Any

from train import data as task_data
from train import placing, session
from train.data import TaskData
from train.examples import Reader
from train.schema import Config
from train.tasks import task_of


class Materials:
    """The parts of runs of `config` that neither method nor rates change.

    data: `config.data` with its labels. train_rows, test_rows: to train on and held out. abstract: the model has
    shapes instead of arrays. mesh, rules: over which it is spread, and how.
    """

    def __init__(self, config: Config, *, abstract: bool = False):
        self.data, self.train_rows, self.test_rows = task_data.read(config.data, config.model.task)
        self.config = config.model_copy(update={"data": self.data})
        self.abstract = abstract
        self.mesh = placing.mesh_of(config)
        self.rules = None if self.mesh is None else placing.rules_of(config)
        self._tokenizer: Any = None
        self._model: tuple[int | None, Any] | None = None
        self._examples: dict[tuple[int, bool], TaskData] = {}

    def tokenizer(self) -> Any:
        """The tokenizer that the configuration names."""
        if self._tokenizer is None:
            self._tokenizer = session.tokenizer(self.config)
        return self._tokenizer

    def model(self, seed: int) -> Any:
        """The base model; a new head, where the task has one, is that of `seed`. The last model asked for is kept."""
        has_head = task_of(self.data, self.config.model.task).outputs is not None
        made_of = seed if has_head else None
        if self._model is None or self._model[0] != made_of:
            self._model = None  # two at once may be more than fits
            training = self.config.training.model_copy(update={"seed": seed})
            config = self.config.model_copy(update={"training": training})
            if self.abstract:
                self._model = made_of, session.abstract_model(config)
            else:
                self._model = made_of, session.base_model(config, self.mesh, self.rules)
        return self._model[1]

    def reader(self, model: Any) -> Reader:
        """Reads texts as long as the adapted `model` can take them."""
        limit = min(self.data.max_length, session.context(model) or self.data.max_length)
        return Reader(self.tokenizer(), limit, types=session.takes_types(model))

    def examples(self, model: Any) -> TaskData:
        """The tokenised rows for the adapted `model`. Raises JpeftError if it cannot learn the task."""
        kind, reader = task_of(self.data, self.config.model.task), self.reader(model)
        kind.check_model(model)
        key = reader.max_length, reader.types
        if key not in self._examples:
            rows = self.train_rows, self.test_rows
            self._examples[key] = task_data.prepare(kind, *rows, reader.tokenizer, key[0], types=key[1])
        return self._examples[key]
