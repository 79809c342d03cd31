"""Rows that are read while a run goes on, a chunk at a time, for data that is too large to be read before it begins.

The order is a pure function of seed, pass over the source, and chunk: a chunk is so many rows that follow each other in
the source, and its rows are shuffled among themselves. So a run that was stopped begins to read where its chunk begins.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.errors import JpeftError
from train import packages, sources
from train.ahead import Ahead
from train.batches import Window, plan
from train.examples import Example, Reader
from train.files import Rows, files_in, kind_of_feature, table, text_rows
from train.schema import DataConfig

if TYPE_CHECKING:
    from train.tasks import Task


class Stream:
    """The rows of `data.source` but for those held out, in chunks of `data.chunk`, as often as they are asked for.

    Raises JpeftError for keys of `data` that need all rows at once.
    """

    def __init__(self, data: DataConfig):
        sources.check_keys(data)
        self._data = data
        self._held_out = int(data.test_size or 0)
        self._features: dict[str, Any] = {}  # of each column, as the first rows had it that held something
        self._columns: tuple[str, ...] = ()

    def first(self) -> Rows:
        """The first chunk, with this stream behind it. Raises JpeftError if there is no row to train on."""
        rows = next(self.chunks(0), None)
        if rows is None:
            left = f" behind the {self._held_out} that data.test_size holds out" if self._held_out else ""
            raise JpeftError(f"{self._data.source}: there are no rows to train on{left}")
        return dataclasses.replace(rows, stream=self)

    def held_out(self) -> Rows:
        """The rows at the front of the source that `data.test_size` keeps from training."""
        read = self._read()
        rows = list(itertools.islice(read.rows, self._held_out))
        return read.table(rows, self._columns) if rows else self.first()

    def chunks(self, number: int) -> Iterator[Rows]:
        """One pass over the source from chunk `number` on."""
        read = self._read()
        begin, end = self._held_out, None if self._data.limit is None else self._held_out + self._data.limit
        rows = itertools.islice(read.rows, begin + number * self._data.chunk, end)
        while chunk := list(itertools.islice(rows, self._data.chunk)):
            made = read.table(chunk, self._columns)
            self._columns = self._columns or tuple(made.dataset.column_names)
            yield self._alike(made)

    def _alike(self, rows: Rows) -> Rows:
        """`rows`, whose columns hold what they held in the chunks before. Raises JpeftError where one does not."""
        table = rows.dataset
        for column, feature in rows.dataset.features.items():
            kind = kind_of_feature(feature)
            if kind == "null":  # which tasks take for a column that never holds anything
                if column in self._features:
                    table = table.cast_column(column, self._features[column])
                continue
            before = kind_of_feature(self._features.setdefault(column, feature))
            if kind != before:
                raise JpeftError(
                    f"{rows.place(0)}: from here on column {column!r} holds {kind}, before it held {before}; write one "
                    "kind in all rows"
                )
        return dataclasses.replace(rows, dataset=table)

    def _read(self) -> _Read:
        source = sources.expanded(self._data.source)
        if source.startswith(packages.PREFIX):
            known = packages.rows(source)
            if known is not None:
                path, numbers, found = known
                lines = [f"{path}, line {number}" for number in numbers]
                return _Read(zip(lines, found, strict=True), source)
            source = packages.resolve(source)
        if not sources.on_hub(source):
            files = files_in(Path(source))
            return _parquet(files, source) if files[0].suffix == ".parquet" else _Text(files, source)
        split = self._data.split
        table = sources.from_hub(source, self._data.subset, split, streaming=True)
        return _Read(_from_hub(table, f"{source} ({split})"), source, table.features)


class _Read:
    """A source that is being read. rows: pairs of where a row stands, and the row."""

    def __init__(self, rows: Iterator[tuple[Any, dict[str, Any]]], name: str, features: Any = None):
        self.rows, self._name, self._features = rows, name, features

    def table(self, placed: Sequence[tuple[Any, dict[str, Any]]], known: Sequence[str]) -> Rows:
        """These rows. known: the columns of the rows before."""
        import datasets

        places = [place for place, _ in placed]
        columns = dict.fromkeys(self._features or [*known, *(column for _, row in placed for column in row)])
        values = {column: [row.get(column) for _, row in placed] for column in columns}
        try:
            table = datasets.Dataset.from_dict(values, features=self._features)
        except Exception as error:  # datasets and pyarrow raise whatever their conversions do
            raise JpeftError(
                f"{places[0]} to {places[-1]}: a column cannot hold what is there: {error.__cause__ or error}"
            ) from error
        return Rows(table, lambda index: str(places[index]), self._name)


class _Text(_Read):
    """Text files, which are decoded and checked line by line."""

    def __init__(self, files: Sequence[Path], name: str):
        super().__init__((row for file in files for row in text_rows(file)), name)

    def table(self, placed: Sequence[tuple[Any, dict[str, Any]]], known: Sequence[str]) -> Rows:
        return table(self._name, placed, known)


def _from_hub(table: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for row in table:
            yield f"{name}, row {number}", row
            number += 1
    except Exception as error:  # of the connection, or of the parsers of datasets
        raise JpeftError(f"{name}, row {number}: cannot be read: {error.__cause__ or error}") from error


def _parquet(files: Sequence[Path], name: str) -> _Read:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    def opened(path: Path) -> Any:
        try:
            return parquet.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise JpeftError(f"{path}: cannot be read: {error}") from error

    def features(path: Path) -> Any:
        with opened(path) as file:
            try:
                return datasets.Features.from_arrow_schema(file.schema_arrow)
            except ValueError as error:  # of types that datasets has not
                raise JpeftError(f"{path}: cannot be read: {error}") from error

    alike = features(files[0])
    for path in files[1:]:
        if features(path) != alike:
            raise JpeftError(f"{path}: its columns are not those of {files[0].name}; write them alike")

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for path in files:
            number = 0
            try:
                for batch in opened(path).iter_batches():
                    for row in batch.to_pylist():
                        yield f"{path}, row {number}", row
                        number += 1
            except (pa.ArrowException, OSError) as error:
                raise JpeftError(f"{path}, after row {number}: cannot be read: {error}") from error

    return _Read(rows(), name, alike)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows that were read together, and what is learnt of them. epoch: the pass over the source."""

    rows: Rows
    examples: list[Example]
    epoch: int
    number: int


@dataclasses.dataclass(frozen=True)
class StreamedWindow(Window):
    """A window of the rows of `chunk`. number: of the window among those of its chunk."""

    chunk: Chunk = dataclasses.field(kw_only=True, repr=False)
    number: int = dataclasses.field(kw_only=True)

    @property
    def behind(self) -> list[int]:
        """Where the next window is: [epoch, chunk, window]."""
        return [self.chunk.epoch, self.chunk.number, self.number + 1]


class Streamed:
    """The examples of a stream, pass after pass without end.

    counts: what was cut or left out of the chunks that were read, the first one's aside.
    """

    def __init__(self, stream: Stream, task: Task, reader: Callable[[], Reader]):
        self._stream, self._task, self._reader = stream, task, reader
        self.counts: Counter[str] = Counter()

    def windows(self, at: Sequence[int], buckets: Sequence[int], size: int, seed: int) -> Iterator[StreamedWindow]:
        """The windows of `size` rows from `at` on ([epoch, chunk, window]), read and tokenised in a thread."""
        epoch, number, skip = at
        chunks = self._passes(epoch, number)
        coming = Ahead(lambda _: next(chunks), itertools.count(), depth=1)
        for _, chunk in coming:
            lengths = [len(example) for example in chunk.examples]
            made = plan(lengths, buckets, size, seed, chunk.epoch, chunk=chunk.number)
            for place, window in enumerate(made[skip:], skip):
                yield StreamedWindow(window.rows, window.length, window.epoch, chunk=chunk, number=place)
            skip = 0

    def _passes(self, epoch: int, number: int) -> Iterator[Chunk]:
        from train.tasks import check_columns

        while True:
            empty = number == 0
            for rows in self._stream.chunks(number):
                check_columns(self._task, rows)
                self._task.check(rows)
                reader = self._reader()
                examples = self._task.examples(rows, reader)
                if number:
                    self.counts += +reader.counts
                if examples:
                    empty = False
                    yield Chunk(rows, examples, epoch, number)
                number += 1
            if empty:
                raise JpeftError(f"{self._task.data.source}: nothing is left to learn of any row")
            epoch, number = epoch + 1, 0
