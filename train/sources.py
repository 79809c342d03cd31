"""Rows from files, the hub or packages as a `datasets.Dataset`, each of which can say where it came from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.errors import JpeftError
from train import packages
from train.files import FORMATS, Rows, listed, quiet, read_files
from train.schema import DataConfig


def load(data: DataConfig) -> tuple[Rows, Rows]:
    """(training rows, held-out rows), disjoint, chosen by `data.seed`; the held-out rows do not depend on `limit`.

    Raises JpeftError for keys that `data.source` has no use for and for held-out rows that are those to train on.
    """
    check_keys(data)
    train = read(data.source, data.subset, data.split)
    order = np.random.Generator(np.random.PCG64([data.seed, len(train)])).permutation(len(train))
    test = held_out(data)
    if test is None:
        size = 0.1 if data.test_size is None else data.test_size
        count = int(size) if size >= 1 else max(1, round(size * len(train)))
        if count >= len(train):
            raise JpeftError(
                f"data.test_size: {count} of the {len(train)} rows of {train.name} leave none to train on; give fewer"
            )
        test, order = train.select(order[:count]), order[count:]
    return train.select(order[: data.limit]), limited(data, test)


def held_out(data: DataConfig) -> Rows | None:
    """The rows of `data.test_source` or `data.test_split` in the order of `data.seed`; None if neither is given."""
    if data.test_source is None and data.test_split is None:
        return None
    test = read(data.test_source or data.source, data.subset, data.test_split or data.split)
    return test.select(np.random.Generator(np.random.PCG64([data.seed, len(test)])).permutation(len(test)))


def limited(data: DataConfig, test: Rows) -> Rows:
    """The first `data.test_limit` of the held-out rows."""
    return test if data.test_limit is None else test.select(range(min(data.test_limit, len(test))))


def mixed(data: DataConfig, train: Rows, columns: Iterable[str]) -> Rows:
    """`train` and behind it the rows of the sources in `data.mix`, with `columns` alone.

    Raises JpeftError if a source is there twice, lacks a column, or has values of another kind in it.
    """
    import datasets

    if not data.mix:
        return train
    columns, parts, seen = list(dict.fromkeys(columns)), [train], {"data.source": data.source}
    if data.test_source is not None:
        seen["data.test_source"] = data.test_source
    for source in data.mix:
        for key, other in seen.items():
            if (twice := _same(source, other)) is not None:
                raise JpeftError(f"data.mix: {source} {twice} {key} already; give another source, or leave it out")
        seen[f"{source} in data.mix"] = source
        parts.append(read(source))
    for part in parts:
        part.require(columns)
    tables = [part.dataset.select_columns(columns) for part in parts]
    for part, table in zip(parts, tables, strict=True):
        for column in columns:
            kind, first = table.features[column], tables[0].features[column]
            if kind != first:
                raise JpeftError(
                    f"{part.name}: column {column!r} is {_feature(kind)}, in {train.name} {_feature(first)}; write it "
                    "alike"
                )
    ends = np.cumsum([len(part) for part in parts])

    def place(index: int) -> str:
        at = int(np.searchsorted(ends, index, side="right"))
        return parts[at].place(index - int(ends[at]) + len(parts[at]))

    origins = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    names = " + ".join(part.name for part in parts)
    return Rows(datasets.concatenate_datasets(tables), place, names, origins)


def _feature(feature: Any) -> str:
    """The type of a column in a few words."""
    return str(getattr(feature, "dtype", feature))


def expanded(source: str) -> str:
    """`source` with `~` as the home folder, which no shell puts in for `data.source=~/rows.jsonl`."""
    return str(Path(source).expanduser()) if source.startswith("~") else source


def on_hub(source: str) -> bool:
    """Whether `source` names a data set of the hub, not a file or a package."""
    path = Path(expanded(source))
    return not (source.startswith(packages.PREFIX) or path.suffix in FORMATS or path.exists())


def check_keys(data: DataConfig) -> None:
    """Raises JpeftError for keys that would be ignored and for held-out rows that are those to train on."""
    hub = on_hub(data.source)
    test_hub = hub if data.test_source is None else on_hub(data.test_source)
    mend = (
        "a file or package has no splits: give the held-out rows with data.test_source, or how many to hold out with "
        "data.test_size"
    )
    if data.split != "train" and not hub:
        raise JpeftError(f"data.split: {data.split!r} is for data sets of the hub, {data.source} is none; {mend}")
    if data.test_split is not None and not test_hub:
        named = data.source if data.test_source is None else data.test_source
        raise JpeftError(f"data.test_split: {data.test_split!r} is for data sets of the hub, {named} is none; {mend}")
    if data.subset is not None and not (hub or test_hub):
        raise JpeftError(
            f"data.subset: {data.subset!r} is for data sets of the hub, {data.source} is none; leave it out"
        )
    shared = None if data.test_source is None else _same(data.test_source, data.source)
    if shared is not None:
        if not hub:
            raise JpeftError(
                f"data.test_source: {data.test_source} {shared} data.source, so the held-out rows would be those to "
                "train on; give another file, or leave test_source out and say how many rows to hold out with "
                "data.test_size"
            )
        if data.test_split is None:
            raise JpeftError(
                f"data.test_source: {data.test_source} is data.source; name the held-out split with data.test_split"
            )
    if not hub or data.test_split is None or not (data.test_source is None or data.test_source == data.source):
        return
    (base, *part), (test_base, *test_part) = data.split.split("[", 1), data.test_split.split("[", 1)
    if base == test_base and (part == test_part or not part or not test_part):
        raise JpeftError(
            f"data.test_split: {data.test_split!r} has rows of data.split ({data.split}), so held-out rows would be "
            "rows to train on; name another split, or leave it out and hold rows out with data.test_size"
        )


def _same(one: str, other: str) -> str | None:
    """How a source has rows of another one, by whatever path: it `is` that, or `has files of` it."""

    def real(source: str) -> set[str]:
        if source.removeprefix(packages.PREFIX) in packages.DATASETS:
            return {source}
        source = packages.resolve(expanded(source))
        path = Path(source)
        return (
            {source}
            if on_hub(source)
            else {str(file.resolve()) for file in (listed(path) if path.is_dir() else [path])}
        )

    if one == other:
        return "is"
    found, among = real(one), real(other)
    return "is" if found == among else "has files of" if found & among else None


def read(source: str, subset: str | None = None, split: str = "train") -> Rows:
    """All rows of a file, of the files in a folder, of a packaged data set, or of a split on the hub.

    Raises JpeftError naming file and line of what cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    source = expanded(source)
    if source.startswith(packages.PREFIX):
        known = packages.rows(source)
        if known is not None:
            path, numbers, rows = known
            return Rows(datasets.Dataset.from_list(rows), lambda i: f"{path}, line {numbers[i]}", source)
        source = packages.resolve(source)
    return _hub(source, subset, split) if on_hub(source) else read_files(Path(source))


def _hub(source: str, subset: str | None, split: str) -> Rows:
    table = from_hub(source, subset, split)
    return Rows(table, lambda index: f"{source} ({split}), row {index}", source)


def from_hub(source: str, subset: str | None, split: str, *, streaming: bool = False) -> Any:
    """A data set of the hub as `datasets` gives it. Raises JpeftError if there is none."""
    import datasets

    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise JpeftError(f"{source}: no such file")
    try:
        with quiet():
            return datasets.load_dataset(source, subset, split=split, streaming=streaming)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JpeftError(
            f"data.source {source!r} is no file here and could not be loaded from the hub "
            f"(subset {subset}, split {split}): {reason}"
        ) from error
