"""How the keys of a configuration go together: what each section alone cannot tell.

Metrics that the task has, columns that make one task, rows that are read as the run goes on, groups of an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jpeft.errors import nearest
from train import starts
from train.schema import Config
from train.strict_yaml import Fault, Faults, Node


def faults(config: Config, children: Mapping[str, Node]) -> Faults:
    """What is wrong in how the keys of `config` go together. children: its sections as they stand in the file."""
    found: Faults = []
    data, where = config.data, children["data"].where

    def fault(key: str, message: str) -> None:
        node = children["data"].value
        at = node[key].where if isinstance(node, dict) and key in node else where
        found.append(Fault(at, f"data.{key}", message))

    for key, message in _task_faults(config):
        fault(key, message)
    found += _group_faults(config, children)
    found += [Fault(children["method"].where, "method", said) for said in starts.faults(config)]
    if not found:
        for key, message in _metric_faults(config):
            given = children["evaluation"].value
            at = given[key].where if isinstance(given, dict) and key in given else children["evaluation"].where
            found.append(Fault(at, f"evaluation.{key}", message))
    if config.model.pooling is not None and data.label is None:
        fault("label", "required: model.pooling is for classification")
    if sum(value is not None for value in (data.test_source, data.test_split)) and data.test_size is not None:
        fault("test_size", "does not go with test_source or test_split")
    for key, message in _streaming_faults(config):
        fault(key, message)
    if data.test_size is not None and data.test_size >= 1 and not float(data.test_size).is_integer():
        fault("test_size", f"{data.test_size} is neither a number of rows nor a fraction below 1")
    return found


def _group_faults(config: Config, children: Mapping[str, Node]) -> Faults:
    """Settings of `training.groups` that there are none of, or that no optimizer can use."""
    faults: Faults = []
    known = {"learning_rate": "above 0", "weight_decay": "0 or more"}
    for group, settings in (config.training.groups or {}).items():
        for name, value in settings.items():
            key, where = f"training.groups.{group}.{name}", children["training"].where
            if name not in known:
                near = nearest(name, list(known), 1)[0]
                faults.append(Fault(where, key, f"unknown key; did you mean {near}? (known: {', '.join(known)})"))
            elif value < 0 or (name == "learning_rate" and value == 0):
                faults.append(Fault(where, key, f"{value!r} must be {known[name]}"))
    return faults


def _streaming_faults(config: Config) -> Iterator[tuple[str, str]]:
    """(key of `data:`, what is wrong) where rows that are read as the run goes on do not allow a key."""
    data, training = config.data, config.training
    if not data.streaming:
        if data.chunk != type(data).model_fields["chunk"].default:
            yield "chunk", "is for data.streaming; leave it out, or set data.streaming: true"
        return
    if training.max_steps is None or training.epochs is not None:
        yield "streaming", "needs training.max_steps, and no training.epochs: how many rows there are is not known"
    if data.test_source is None and data.test_split is None and (data.test_size is None or data.test_size < 1):
        yield "streaming", "needs data.test_source, data.test_split, or a number of rows as data.test_size"
    if data.mix:
        yield "mix", "does not go with data.streaming, whose rows come from one source"


def _metric_faults(config: Config) -> Iterator[tuple[str, str]]:
    """(key of `evaluation:`, what is wrong) for each metric that the task does not have."""
    from train.metrics import METRICS
    from train.tasks import task_of

    names, best = config.evaluation.metrics, config.evaluation.best
    task = task_of(config.data, config.model.task)
    known = dict.fromkeys([*METRICS.get(task.measure or "", ()), *task.metrics, "loss"])
    silent = task.writes and config.evaluation.answers == "none"
    for key, name in [*(("metrics", name) for name in names or ()), *([("best", best)] if best else [])]:
        if name not in known:
            near = nearest(name, known, 1)[0]
            yield key, f"{name!r} is no metric of {task.name}; did you mean {near}? (there are {', '.join(known)})"
        elif silent and name in METRICS["texts"]:
            yield key, f"{name} scores answers, and evaluation.answers is none"
        elif key == "best" and names and name not in (*names, "loss"):
            yield key, f"{name} is not among evaluation.metrics; add it there"
    if names == []:
        yield "metrics", "the list is empty; leave it out for the default ones"


def _task_faults(config: Config) -> Iterator[tuple[str, str]]:
    """(key of `data:`, what is wrong) where keys do not describe one task, or the model's head is not for it."""
    from train.tasks import MARKS, TASKS, possible
    from train.tasks.classification import SequenceTask

    data, head = config.data, config.model.task
    given = {key for key, field in type(data).model_fields.items() if getattr(data, key) != field.default}
    marks = [mark for mark in MARKS if mark in given and mark != "text"] or ["text"]
    kinds = possible(data)
    if data.label is not None and not kinds:
        types = [kind.problem_type for kind in TASKS.values() if issubclass(kind, SequenceTask)]
        near = nearest(str(data.problem_type), types, 1)[0]
        yield "problem_type", f"{data.problem_type!r} is none of {', '.join(types)}; did you mean {near}?"
        return
    kinds = kinds or [TASKS["text"]]
    others = ", ".join(mark for mark in MARKS if mark != "text")
    if len(marks) > 1:
        yield marks[1], f"{' and '.join(marks)} are given; a run has one of {others}"
    for key in kinds[0].required:
        if key not in given:
            yield (
                key,
                f"required beside data.{marks[0]}"
                if key != marks[0]
                else (f"required: the column with the text (or give {others})"),
            )
    heads = list(dict.fromkeys(kind.head for kind in kinds))
    if head is not None and head not in heads:
        yield marks[0], f"is for {' or '.join(heads)}; model.task is {head}"
    kinds = [kind for kind in kinds if head in (None, kind.head)] or kinds
    uses = {key for kind in kinds for key in kind.data_keys()}
    for key in dict.fromkeys(key for kind in TASKS.values() for key in kind.data_keys()):
        if key in given and key not in uses and key not in marks:
            users = [kind for kind in TASKS.values() if key in kind.data_keys()]
            needed = " or ".join(dict.fromkeys(f"data.{kind.required[0]}" for kind in users))
            if key == "text":
                yield key, f"does not go with {marks[0]}"
            elif key == "packing":
                yield key, "is for plain text (data.text alone) and causal-lm"
            elif marks[0] in {kind.required[0] for kind in users}:
                yield key, f"is not for data.problem_type {data.problem_type}"
            else:
                yield key, f"needs {needed} beside it"
