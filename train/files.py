"""Rows, and how they are read from files: json, jsonl, csv, tsv, parquet, and folders of them.

Text files are read here, not by `datasets`: text stays as it is written (`007`, `1.50`, `2024-01-01`), and what is
wrong with a file is said with its name and line.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import csv
import dataclasses
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jpeft.errors import JpeftError, nearest

if TYPE_CHECKING:
    from train.streams import Stream

FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table of rows. dataset: a `datasets.Dataset`; place: where a row came from, `data.csv, line 12`.

    origins: of rows that are mixed, the number of the source of each, [N]. stream: where these are the first rows of,
    if the others are read later.
    """

    dataset: Any
    place: Callable[[int], str]
    name: str
    origins: np.ndarray | None = None
    stream: Stream | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def select(self, indices: Iterable[int]) -> Rows:
        """The rows at `indices`, in that order."""
        chosen = [int(index) for index in indices]
        place = self.place
        origins = None if self.origins is None else self.origins[chosen]
        return Rows(self.dataset.select(chosen), lambda index: place(chosen[index]), self.name, origins)

    def require(self, columns: Iterable[str]) -> None:
        """Raises JpeftError naming each missing column and the nearest ones there are."""
        present = list(self.dataset.column_names)
        missing = [column for column in columns if column not in present]
        if missing:
            near = {name: ", ".join(nearest(name, present, 3)) for name in missing}
            said = "; ".join(f"no column {name!r} (nearest: {names})" for name, names in near.items())
            raise JpeftError(f"{self.name}: {said}; the columns are {', '.join(present)}")


def read_files(path: Path) -> Rows:
    """All rows of a file, or of the files in a folder. Raises JpeftError naming file and line of what is wrong."""
    files = files_in(path)
    try:
        if files[0].suffix != ".parquet":
            for file in files:
                _check_utf8(file)
            rows = table(str(path), [row for file in files for row in text_rows(file)])
        else:
            rows = _parquet(path, files)
    except OSError as error:
        raise JpeftError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(rows) == 0:
        raise JpeftError(f"{path}: the file has no rows" if path.is_file() else f"{path}: its files have no rows")
    return rows


def files_in(path: Path) -> list[Path]:
    """`path`, or the files of the one format that are in this folder, by name.

    Raises JpeftError for what is no file of a known format, or an empty one.
    """
    if not path.is_dir():
        check_file(path)
        return [path]
    files = listed(path)
    if not files:
        raise JpeftError(f"{path}: there are no rows in this folder; files end in {', '.join(FORMATS)}")
    other = next((file for file in files if file.suffix != files[0].suffix), None)
    if other is not None:
        raise JpeftError(
            f"{path}: a folder of rows has files of one format, and in it are {files[0].name} and {other.name}; give "
            "one of the files, or a folder for each format"
        )
    for file in files:
        check_file(file)
    return files


def listed(path: Path) -> list[Path]:
    """What is in a folder under the name of a file of rows."""
    try:
        return sorted(file for file in path.iterdir() if file.suffix in FORMATS and not file.name.startswith("."))
    except OSError as error:
        raise JpeftError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_file(path: Path) -> None:
    """Raises JpeftError for what is no file of a known format, or an empty one."""
    if path.exists() and not path.is_file():
        raise JpeftError(f"{path}: a {'folder' if path.is_dir() else 'device'} that is named like a file; give a file")
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*") if p.suffix in FORMATS] if path.parent.is_dir() else []
        near = f"; nearest: {', '.join(nearest(str(path), beside, 3))}" if beside else ""
        raise JpeftError(f"{path}: no such file{near}")
    if path.suffix not in FORMATS:
        raise JpeftError(f"{path}: files end in {', '.join(FORMATS)}, which says how to read them")
    try:
        if path.stat().st_size == 0:
            raise JpeftError(f"{path}: the file is empty")
    except OSError as error:
        raise JpeftError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parquet(path: Path, files: Sequence[Path]) -> Rows:
    import datasets

    tables = []
    for file in files:
        try:
            with quiet():
                tables.append(datasets.load_dataset("parquet", data_files=glob.escape(str(file)), split="train"))
        except Exception as error:  # datasets raises whatever its parsers do
            raise JpeftError(f"{file}: cannot be read: {error.__cause__ or error}") from error
        if tables[-1].features != tables[0].features:
            raise JpeftError(f"{file}: its columns are not those of {files[0].name}; write them alike")
    ends = np.cumsum([len(one) for one in tables])

    def place(index: int) -> str:
        at = int(np.searchsorted(ends, index, side="right"))
        return f"{files[at]}, row {index - int(ends[at]) + len(tables[at])}"

    return Rows(datasets.concatenate_datasets(tables), place, str(path))


class Line(NamedTuple):
    """A line of a text file, from 1."""

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}"


def text_rows(path: Path) -> Iterator[tuple[Line, dict[str, Any]]]:
    """(line, row) of a json, jsonl, csv or tsv file. Raises JpeftError where it comes to what is wrong with one."""
    rows = _separated(path) if path.suffix in (".csv", ".tsv") else _json_rows(path)
    try:
        for number, row in rows:
            yield Line(path, number), row
    except UnicodeDecodeError as error:  # which does not know its line
        _check_utf8(path)
        raise JpeftError(f"{path}: not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise JpeftError(f"{path}: cannot be read: {error.strerror or error}") from error


def table(name: str, numbered: Sequence[tuple[Line, dict[str, Any]]], known: Sequence[str] = ()) -> Rows:
    """These rows of text files of one format; name: of all of them together. known: columns of the rows before."""
    import datasets
    import pyarrow as pa

    lines = [line for line, _ in numbered]
    columns = dict.fromkeys([*known, *(column for _, row in numbered for column in row)])
    if lines and lines[0].path.suffix in (".csv", ".tsv"):
        short = len(known) or len(columns)
        odd = next((line for line, row in numbered if not short == len(row) == len(columns)), None)
        if odd is not None:
            raise JpeftError(f"{name}: the files do not have the same columns: {', '.join(columns)} (see {odd})")
        typed = {column: pa.array([row[column] for _, row in numbered], pa.string()) for column in columns}
    else:
        typed = {column: _typed(column, lines, [row.get(column) for _, row in numbered]) for column in columns}
    if numbered and not typed:
        raise JpeftError(f"{lines[0]}: the rows have no columns")
    return Rows(datasets.Dataset(pa.table(typed)), lambda index: str(lines[index]), name)


def _typed(name: str, lines: Sequence[Line], values: list[Any]) -> Any:
    """A column of one type: a table holds no others. Raises JpeftError with the line where the type changes."""
    import pyarrow as pa

    def fault(count: int) -> Exception | None:
        try:
            pa.array(values[:count])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            return error
        return None

    if fault(len(values)) is None:
        return pa.array(values)
    at = bisect.bisect_left(range(1, len(values) + 1), True, key=lambda count: fault(count) is not None)
    kind, place = kind_of(values[at]), f"{lines[at]}: column {name!r} holds"
    line, before = next(
        ((line, kind_of(value)) for line, value in zip(lines, values, strict=True) if value is not None)
    )
    if kind != before:
        where = f"line {line.number}" if line.path == lines[at].path else str(line)
        raise JpeftError(
            f"{place} {kind}, but {before} in {where}; write one kind in all rows, numbers among text in quotes"
        )
    raise JpeftError(f"{place} {kind} that a column cannot hold beside those above: {fault(at + 1)}")


def kind_of_feature(feature: Any) -> str:
    """What a column holds, in the words of `kind_of`."""
    import datasets

    if not isinstance(feature, datasets.Value):
        return "an object" if isinstance(feature, dict) else "a list" if hasattr(feature, "feature") else "labels"
    kind = feature.dtype
    if kind in ("string", "large_string", "null"):
        return "null" if kind == "null" else "text"
    return "true or false" if kind == "bool" else "a number" if re.match("u?int|float", kind) else kind


def kind_of(value: Any) -> str:
    """What a value is, in a user's words: `text`, `a number`, `a list`."""
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a file with an object a line or, if it ends in .json, one array of objects."""
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            for number, value in _array(path, text):
                yield number, _object(path, number, value, "each entry")
            return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise JpeftError(f"{path}, line {number}: not UTF-8 text: {error.reason}") from None
            if line.strip():
                yield number, _object(path, number, _parsed(path, number, line), "each line")


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line, entry) of the one array that `text` is."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")

    def skip(at: int) -> int:
        found = blank.match(text, at)
        return found.end() if found else at

    _parsed(path, None, text)
    number, counted, at = 1, 0, skip(text.index("[") + 1)
    while text[at] != "]":
        number, counted = number + text.count("\n", counted, at), at
        value, at = decoder.raw_decode(text, at)
        yield number, value
        at = skip(at)
        at = skip(at + 1) if text[at] == "," else at


def _parsed(path: Path, number: int | None, text: str) -> Any:
    """The value that `text`, which is line `number` or the whole file, is."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON; write null")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line = error.lineno if number is None else number
        # An object over several lines is no row: its first line is no JSON by itself.
        array = path.suffix == ".json" and number is not None
        form = "; the file is to be one array of objects, or to have a whole object on each line" if array else ""
        raise JpeftError(f"{path}, line {line}: not valid JSON: {error.msg} at column {error.colno}{form}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        place = path if number is None else f"{path}, line {number}"
        raise JpeftError(f"{place}: not valid JSON: {error}") from None


def _object(path: Path, number: int, value: Any, each: str) -> dict[str, Any]:
    if isinstance(value, dict):
        bad = [name for name in value if _SURROGATE.search(name)]
        if bad:
            raise JpeftError(f"{path}, line {number}: the column name {bad[0]!r} has half of a character in it")
        return value
    array = "; a file that is one array of objects ends in .json" if isinstance(value, list) and number == 1 else ""
    raise JpeftError(f"{path}, line {number}: {kind_of(value)}; {each} must be a JSON object{array}")


def _separated(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(the line in which it begins, row) of a csv or tsv file, all of it text; empty fields are ''."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            names: list[str] = []
            begin = 1
            try:
                for row in reader:
                    if row and not names:
                        names = [name or f"column {number}" for number, name in enumerate(row, 1)]
                        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
                        if twice is not None:
                            raise JpeftError(f"{path}, line {begin}: column {twice!r} is given twice")
                    elif row:
                        if len(row) != len(names):
                            raise JpeftError(
                                f"{path}, line {begin}: {len(row)} fields; the header has {len(names)} (text with "
                                "separators or line breaks in it goes between double quotes)"
                            )
                        yield begin, dict(zip(names, row, strict=True))
                    begin = reader.line_num + 1
            except csv.Error as error:
                raise JpeftError(
                    f"{path}, line {begin}: {error}; a field that begins with a double quote ends with one, and one "
                    "inside it is written twice"
                ) from None
    finally:
        csv.field_size_limit(limit)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps `datasets` from logging what an error of ours says in a line."""
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def _check_utf8(path: Path) -> None:
    """Raises JpeftError with the line of the first bytes that are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while True:
            chunk = file.read(1 << 20)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise JpeftError(f"{path}, line {line}: not UTF-8 text: {error.reason}") from None
            if not chunk:
                return
            line += chunk.count(b"\n")
