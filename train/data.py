"""From rows to examples: columns and templates, labels, and what is done with rows that do not fit.

A missing column, an unknown label or a row without content is an error with file and line, or is counted and said.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jpeft.errors import JpeftError, nearest
from train import sources
from train.examples import Example, Reader, check_messages
from train.schema import DataConfig
from train.sources import Rows


@dataclasses.dataclass(frozen=True)
class TaskData:
    """What a run trains on and is scored by.

    form: "classification", "text", "completion" or "chat". labels: of a classification, in the order of the classes.
    prompts, completions: of the held-out rows (completion form), by position in `test_rows`. choices: every completion
    that occurs in the training rows. counts: what was cut or left out, by set.
    """

    form: str
    train: list[Example]
    test: list[Example]
    train_rows: Rows
    test_rows: Rows
    labels: tuple[str, ...]
    prompts: list[str]
    completions: list[str]
    choices: tuple[str, ...]
    counts: dict[str, Counter[str]]

    @property
    def asked(self) -> list[str]:
        """The prompt of each held-out example (completion form)."""
        return [self.prompts[example.row] for example in self.test] if self.prompts else []

    @property
    def wanted(self) -> list[str]:
        """The right answer to each held-out example: its label or completion."""
        if self.form == "classification":
            return [self.labels[example.label] for example in self.test]
        return [self.completions[example.row] for example in self.test] if self.completions else []


class Template:
    """A column, or text with columns in braces: `Question: {text}`."""

    def __init__(self, given: str, key: str):
        self._given = given
        try:
            fields = [field for field in string.Formatter().parse(given) if field[1] is not None]
        except ValueError as error:
            raise JpeftError(
                f"data.{key}: {given!r} is no template: {error}; a brace itself is written twice"
            ) from None
        names = [str(name) for _, name, _, _ in fields]
        for _, name, form, conversion in fields:
            if form or conversion:
                extra = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                raise JpeftError(
                    f"data.{key}: {given!r}: {{{name}{extra}}} asks for formatting, but columns are written as they "
                    f"are; write {{{name}}}"
                )
        bad = [name for name in names if not name.isidentifier()]
        if bad:
            raise JpeftError(f"data.{key}: {given!r}: {{{bad[0]}}} is no column name; a brace itself is written twice")
        self.columns: tuple[str, ...] = tuple(names) or (given,)
        self._plain = not names

    def __call__(self, row: Mapping[str, Any]) -> str:
        return (
            str(row[self._given]) if self._plain else self._given.format(**{name: row[name] for name in self.columns})
        )


def form_of(data: DataConfig) -> str:
    """Which kind of rows a configuration describes."""
    if data.label is not None:
        return "classification"
    return "completion" if data.completion is not None else "chat" if data.messages is not None else "text"


def read_rows(data: DataConfig) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), with the columns that `data` names; nothing is tokenised yet."""
    train, test = sources.load(data)
    for rows in (train, test):
        rows.require(_columns(data))
        _check_kinds(data, rows)
    return train, test


def _check_kinds(data: DataConfig, rows: Rows) -> None:
    """Raises JpeftError for columns of lists, objects or bytes where text, a number or a label is needed."""
    import datasets

    for column in _columns(data):
        feature = rows.dataset.features[column]
        binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
        if column == data.messages or (isinstance(feature, datasets.Value | datasets.ClassLabel) and not binary):
            continue
        plain = rows.dataset.with_format(None)[column]
        at, value = next(((i, v) for i, v in enumerate(plain) if v is not None), (0, None))
        key = next(key for key, columns in _columns_by_key(data).items() if column in columns)
        raise JpeftError(
            f"{rows.place(at)}: column {column!r}, which data.{key} uses, holds {sources.kind_of(value)}, not "
            "text; make it text in the file, or name another column"
        )


def labels_of(data: DataConfig, train: Rows) -> tuple[str, ...]:
    """The classes of a classification; `()` for everything else."""
    if data.label is None:
        return ()
    if data.labels is not None:
        twice = [label for label, count in Counter(data.labels).items() if count > 1]
        if twice:
            raise JpeftError(f"data.labels: {twice[0]!r} is given twice")
        return tuple(data.labels)
    names = getattr(train.dataset.features[data.label], "names", None)
    if names:
        return tuple(names)
    found = {value for value in train.dataset[data.label] if not _missing(value)}
    if len(found) < 2:
        raise JpeftError(
            f"{train.name}: column {data.label!r} has {len(found)} different labels in the training rows; 2 needed"
        )
    if len(found) > 1000:
        raise JpeftError(f"{train.name}: column {data.label!r} has {len(found)} different values; is it the label?")
    if all(isinstance(value, int | float) for value in found):
        return tuple(str(value) for value in sorted(found))
    names = sorted(map(str, found))
    whole = all(re.fullmatch("-?[0-9]{1,9}", name) for name in names)  # as text files write the numbers of classes
    return tuple(sorted(names, key=int) if whole else names)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def check_rows(data: DataConfig, rows: Rows, labels: Sequence[str]) -> None:
    """Raises JpeftError with file and line of the first row that cannot be used; nothing is tokenised for it."""
    form = form_of(data)
    if form == "classification":
        number = _class_numbers(data, rows, labels)
        for index, value in enumerate(rows.dataset[str(data.label)]):
            number(value, index)
    elif form == "chat":
        for index, messages in enumerate(rows.dataset[str(data.messages)]):
            check_messages(messages, functools.partial(rows.place, index))
    elif form == "completion":
        for key in ("prompt", "completion"):
            for column in Template(str(getattr(data, key)), key).columns:
                empty = next((i for i, value in enumerate(rows.dataset[column]) if value is None), None)
                if empty is not None:
                    raise JpeftError(f"{rows.place(empty)}: column {column!r}, which data.{key} uses, is empty")


def _class_numbers(data: DataConfig, rows: Rows, labels: Sequence[str]) -> Callable[[Any, int], int]:
    """The function (value of the label column, row) -> number of the class."""
    classes = {label: number for number, label in enumerate(labels)}
    names = getattr(rows.dataset.features[str(data.label)], "names", None)

    def number(value: Any, index: int) -> int:
        if _missing(value):
            raise JpeftError(
                f"{rows.place(index)}: the label is missing: column {data.label!r} is empty; fill it, or leave the "
                "row out"
            )
        name = names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)
        if name not in classes:
            raise JpeftError(
                f"{rows.place(index)}: unknown label {name!r}; the labels are {', '.join(classes)}; nearest: "
                f"{', '.join(nearest(name, classes, 3))} (data.labels sets them)"
            )
        return classes[name]

    return number


def prepare(
    data: DataConfig, train: Rows, test: Rows, labels: Sequence[str], tokenizer: Any, max_length: int, *, types: bool
) -> TaskData:
    """Tokenised examples of both sets, at most `max_length` tokens each; types: whether the model takes token types.

    Raises JpeftError where a set has nothing left.
    """
    form = form_of(data)
    counts: dict[str, Counter[str]] = {}
    made: dict[str, list[Example]] = {}
    for name, rows in (("training", train), ("held-out", test)):
        reader = Reader(tokenizer, max_length, types=types)
        read = _row_reader(data, form, rows, labels, reader)
        made[name] = [example for index, row in enumerate(rows.dataset) for example in read(row, index)]
        counts[name] = +reader.counts
        if not made[name]:
            said = "; ".join(f"{count} {what}" for what, count in counts[name].items()) or "there are none"
            raise JpeftError(f"{rows.name}: no {name} rows are left: {said}")
    prompts, completions, choices = _answers(data, train, test) if form == "completion" else ([], [], ())
    return TaskData(
        form, made["training"], made["held-out"], train, test, tuple(labels), prompts, completions, choices, counts
    )


def _columns_by_key(data: DataConfig) -> dict[str, tuple[str, ...]]:
    if form_of(data) == "completion":
        return {key: Template(str(getattr(data, key)), key).columns for key in ("prompt", "completion")}
    keys = ("text", "text_pair", "label", "messages")
    return {key: (getattr(data, key),) for key in keys if getattr(data, key) is not None}


def _columns(data: DataConfig) -> list[str]:
    return list(dict.fromkeys(column for columns in _columns_by_key(data).values() for column in columns))


def _row_reader(
    data: DataConfig, form: str, rows: Rows, labels: Sequence[str], reader: Reader
) -> Callable[[dict[str, Any], int], Iterable[Example]]:
    if form == "chat":
        messages = str(data.messages)
        return lambda row, index: reader.chat(row[messages], index, functools.partial(rows.place, index))
    if form == "completion":
        prompt, completion = Template(str(data.prompt), "prompt"), Template(str(data.completion), "completion")

        return lambda row, index: reader.completion(prompt(row), completion(row), index)
    text, label, text_pair = str(data.text), str(data.label), data.text_pair
    if form == "text":
        return lambda row, index: reader.text(_text(row[text]), index)
    number = _class_numbers(data, rows, labels)

    def classified(row: dict[str, Any], index: int) -> list[Example]:
        pair = None if text_pair is None else _text(row[text_pair])
        reader.counts["rows without the second text, used with the first alone"] += pair == ""
        return reader.classification(_text(row[text]), pair, number(row[label], index), index)

    return classified


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _answers(data: DataConfig, train: Rows, test: Rows) -> tuple[list[str], list[str], tuple[str, ...]]:
    prompt, completion = Template(str(data.prompt), "prompt"), Template(str(data.completion), "completion")
    prompts = [prompt(row) for row in test.dataset]
    completions = [completion(row) for row in test.dataset]
    return prompts, completions, tuple(dict.fromkeys(completion(row) for row in train.dataset))
