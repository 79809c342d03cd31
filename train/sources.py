"""Rows from files, the hub or packages, through `datasets`, each of which can say where it came from.

What is wrong with a file is said with the file's name and line: `datasets` alone reports a parser's offset.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.errors import JpeftError, nearest
from train import packages
from train.schema import DataConfig

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table of rows. dataset: a `datasets.Dataset`; place: where a row came from, `data.csv, line 12`."""

    dataset: Any
    place: Callable[[int], str]
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def select(self, indices: Iterable[int]) -> Rows:
        """The rows at `indices`, in that order."""
        chosen = [int(index) for index in indices]
        place = self.place
        return Rows(self.dataset.select(chosen), lambda index: place(chosen[index]), self.name)

    def require(self, columns: Iterable[str]) -> None:
        """Raises JpeftError naming each missing column and the nearest ones there are."""
        present = list(self.dataset.column_names)
        missing = [column for column in columns if column not in present]
        if missing:
            near = {name: ", ".join(nearest(name, present, 3)) for name in missing}
            said = "; ".join(f"no column {name!r} (nearest: {names})" for name, names in near.items())
            raise JpeftError(f"{self.name}: {said}; the columns are {', '.join(present)}")


def load(data: DataConfig) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), disjoint, chosen by `data.seed`; the held-out rows do not depend on `limit`."""
    train = read(data.source, data.subset, data.split)
    generator = np.random.Generator(np.random.PCG64([data.seed, len(train)]))
    order = generator.permutation(len(train))
    if data.test_source is not None or data.test_split is not None:
        test = read(data.test_source or data.source, data.subset, data.test_split or data.split)
        test = test.select(np.random.Generator(np.random.PCG64([data.seed, len(test)])).permutation(len(test)))
    else:
        size = 0.1 if data.test_size is None else data.test_size
        count = int(size) if size >= 1 else max(1, round(size * len(train)))
        if count >= len(train):
            raise JpeftError(
                f"data.test_size: {count} of the {len(train)} rows of {train.name} leave none to train on; give fewer"
            )
        test, order = train.select(order[:count]), order[count:]
    train = train.select(order[: data.limit])
    if data.test_limit is not None:
        test = test.select(range(min(data.test_limit, len(test))))
    return train, test


def read(source: str, subset: str | None = None, split: str = "train") -> Rows:
    """All rows of a file, a packaged data set, or a split on the hub.

    Raises JpeftError naming file and line of what cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    if source.startswith(packages.PREFIX):
        known = packages.rows(source)
        if known is not None:
            path, numbers, rows = known
            return Rows(datasets.Dataset.from_list(rows), lambda i: f"{path}, line {numbers[i]}", source)
        source = packages.resolve(source)
    path = Path(source)
    if path.suffix in _FORMATS or path.exists():
        return _file(path)
    return _hub(source, subset, split)


def _file(path: Path) -> Rows:
    import datasets

    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*") if p.suffix in _FORMATS] if path.parent.is_dir() else []
        near = f"; nearest: {', '.join(nearest(str(path), beside, 3))}" if beside else ""
        raise JpeftError(f"{path}: no such file{near}")
    if path.suffix not in _FORMATS:
        raise JpeftError(f"{path}: files end in {', '.join(_FORMATS)}, which says how to read them")
    if path.stat().st_size == 0:
        raise JpeftError(f"{path}: the file is empty")
    if path.suffix != ".parquet":
        _check_utf8(path)
    options: dict[str, Any] = {}
    if _FORMATS[path.suffix] == "csv":
        # Text such as "None" or "NA" is text; pandas would make it a missing value.
        options = {"keep_default_na": False, "sep": "\t" if path.suffix == ".tsv" else ","}
    try:
        table = datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # datasets raises whatever its parsers do
        raise JpeftError(_diagnosis(path) or f"{path}: cannot be read: {error.__cause__ or error}") from error
    if len(table) == 0:
        raise JpeftError(f"{path}: the file has no rows")
    return Rows(table, lambda index: _line(path, index), str(path))


def _check_utf8(path: Path) -> None:
    """Raises JpeftError with the line of the first bytes that are not UTF-8; `datasets` reads them as something."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise JpeftError(f"{path}, line {line}: not UTF-8 text: {error.reason}") from None
            line += chunk.count(b"\n")


def _hub(source: str, subset: str | None, split: str) -> Rows:
    import datasets

    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise JpeftError(f"{source}: no such file")
    try:
        table = datasets.load_dataset(source, subset, split=split)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JpeftError(
            f"data.source {source!r} is no file here and could not be loaded from the hub "
            f"(subset {subset}, split {split}): {reason}"
        ) from error
    return Rows(table, lambda index: f"{source} ({split}), row {index}", source)


def _diagnosis(path: Path) -> str | None:
    """The first line of a json lines or csv file that is broken, and how."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                try:
                    value = json.loads(raw)
                except json.JSONDecodeError as error:
                    return f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}"
                if not isinstance(value, dict):
                    return f"{path}, line {number}: a {type(value).__name__}; each line must be a JSON object"
    if path.suffix in (".csv", ".tsv"):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
                header, count = next(reader, []), 0
                for row in reader:
                    count += bool(row)
                    if row and len(row) != len(header):
                        return f"{path}, line {reader.line_num}: {len(row)} fields; the header has {len(header)}"
        except csv.Error as error:
            return f"{path}: {error}"
        return None if count else f"{path}: the file has no rows"
    return None


def _line(path: Path, index: int) -> str:
    """Where row `index` of a file stands; read again, since it is asked for only when something is wrong."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            filled = (number for number, raw in enumerate(file, 1) if raw.strip())
            return f"{path}, line {next((n for i, n in enumerate(filled) if i == index), '?')}"
    if path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            next(reader, None)
            filled_rows = (row for row in reader if row)
            for at, _ in enumerate(filled_rows):
                if at == index:
                    return f"{path}, line {reader.line_num}"
    return f"{path}, row {index}"
