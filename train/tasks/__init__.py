"""What a run can learn, one small file for each task. A new task is a new file and a line in `TASKS`."""

from __future__ import annotations

from train.schema import DataConfig
from train.tasks.chat import Chat
from train.tasks.classification import Classification
from train.tasks.completion import Completion
from train.tasks.masked import MaskedLanguage
from train.tasks.multi_label import MultiLabel
from train.tasks.regression import Regression
from train.tasks.seq2seq import Seq2Seq
from train.tasks.task import Task, check_columns
from train.tasks.text import Text
from train.tasks.token_classification import TokenClassification

# Where several tasks have the same columns, the first is the default, and `model.task` names the head of another.
TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (
        Classification,
        MultiLabel,
        Regression,
        TokenClassification,
        Completion,
        Seq2Seq,
        Chat,
        Text,
        MaskedLanguage,
    )
}

# The keys of `data:` that decide on the task, `text` only where there is no other.
MARKS = tuple(dict.fromkeys(kind.required[0] for kind in TASKS.values()))


def task_of(data: DataConfig, head: str | None = None) -> Task:
    """The task that a checked configuration describes. head: its `model.task`."""
    return next(kind for kind in possible(data) if head in (None, kind.head))(data)


def possible(data: DataConfig) -> list[type[Task]]:
    """The tasks that rows as in `data` allow, the default first."""
    found = [kind for kind in TASKS.values() if kind.described_by(data)]
    if data.label is not None:  # its text may not be taken for the task
        found = [kind for kind in found if kind.required[0] == "label"]
    return [kind for kind in found if kind.required[0] == found[0].required[0]]


__all__ = ["MARKS", "TASKS", "Task", "check_columns", "possible", "task_of"]
