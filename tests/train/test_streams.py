"""Rows that are read as a run goes on: those of the whole file, in an order that a stopped run goes on with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from jpeft import JpeftError
from tests.train.test_resume import same, stopped_at
from train import config as configs
from train import run, sources
from train.display import Display
from train.schema import DataConfig
from train.streams import Stream, Streamed
from train.tasks import task_of

ROWS = [{"text": f"number {i} is", "answer": ("red", "green")[i % 2]} for i in range(11)]


def data(source: Any, **given: Any) -> DataConfig:
    keys = {"text": "text", "label": "answer", "labels": ["red", "green"], "test_size": 2, "chunk": 4, **given}
    return DataConfig(source=str(source), streaming=True, **keys)


@pytest.fixture(params=["jsonl", "csv", "parquet", "hub"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    table, path = datasets.Dataset.from_list(ROWS), tmp_path / f"rows.{request.param}"
    if request.param == "hub":

        def load(source: str, subset: Any, *, split: str, streaming: bool = False) -> Any:
            return table.to_iterable_dataset() if streaming else table

        monkeypatch.setattr(datasets, "load_dataset", load)
        return "who/rows"
    if request.param == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        getattr(table, f"to_{request.param}")(str(path))
    return str(path)


def test_the_rows_and_places_are_those_of_the_whole(source: str) -> None:
    whole, stream = sources.read(source), Stream(data(source))
    assert list(stream.held_out().dataset) == ROWS[:2]
    for begin in (0, 1, 2):
        chunks = list(stream.chunks(begin))
        assert [len(rows) for rows in chunks] == [4, 4, 1][begin:]
        assert [row for rows in chunks for row in rows.dataset] == ROWS[2 + 4 * begin :]
        places = [rows.place(index) for rows in chunks for index in range(len(rows))]
        assert places == [whole.place(index) for index in range(2 + 4 * begin, 11)]
    first = Stream(data(source, limit=3)).first()
    assert list(first.dataset) == ROWS[2:5]
    assert first.stream is not None
    assert len(list(first.stream.chunks(0))) == 1
    with pytest.raises(JpeftError, match="no rows to train on behind the 20 that data.test_size holds out"):
        Stream(data(source, test_size=20)).first()


def test_windows_begin_anywhere(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    from train.examples import Reader

    settings = data(jsonl(ROWS))

    def windows(at: tuple[int, int, int], count: int) -> list[tuple[str, ...]]:
        streamed = Streamed(Stream(settings), task_of(settings), lambda: Reader(tokenizer, 32))
        made = zip(range(count), streamed.windows(at, (8, 32), 3, 5), strict=False)
        return [tuple(w.chunk.rows.place(w.chunk.examples[row].row) for row in w.rows) for _, w in made]

    whole = windows((0, 0, 0), 15)  # of 4, 4 and 1 rows: two, two and one windows in a pass
    assert sorted(place for rows in whole[:5] for place in rows) == sorted(
        place for rows in whole[5:10] for place in rows
    )
    assert len({place for rows in whole[:5] for place in rows}) == 9
    assert whole[:5] != whole[5:10]
    assert windows((0, 1, 1), 4) == whole[3:7]
    assert windows((1, 0, 0), 5) == whole[5:10]
    assert windows((1, 2, 1), 3) == whole[10:13]


@pytest.fixture
def streamed(bert: Path, config_file: Callable[..., Path], jsonl: Callable[..., Path], tmp_path: Path) -> Path:
    rows = jsonl([{"text": f"the {'one ' * (i % 3)}is", "answer": ("red", "green")[i % 2]} for i in range(23)])
    return config_file(
        f"model: {{source: {bert}, task: sequence-classification, pooling: mean}}\n"
        "method: {name: lora, rank: 2, targets: [query], dropout: 0.1}\n"
        f"data: {{source: {rows}, text: text, label: answer, labels: [red, green], streaming: true, chunk: 8, "
        "test_size: 4, max_length: 8}\n"
        "training: {max_steps: 8, batch_size: 4, learning_rate: 3e-3}\n"
        "evaluation: {every: 8}\n"
        f"output: {{folder: {tmp_path / 'run'}}}\n"
    )


def quiet() -> tuple[Console, Display]:
    console = Console(record=True, width=300, file=io.StringIO())
    return console, Display(console)


def test_a_run_goes_on_after_a_fault_and_a_stop(streamed: Path, tmp_path: Path) -> None:
    """2, 2 and 1 windows in a pass: a fault in its last chunk, then a stop in the second pass."""
    rows = tmp_path / "rows.jsonl"
    good = rows.read_text()
    lines = good.splitlines()
    lines[21] = '{"text": "the is", "answer": "blue"}'
    rows.write_text("\n".join(lines))
    rest = ["checkpoints.every=2", "training.max_steps=8"]
    mend = r"rows\.jsonl, line 22: unknown label 'blue'.*The checkpoint of step 4 is saved: mend the rows"
    console, display = quiet()
    with pytest.raises(JpeftError, match=mend):
        run.train(streamed, rest, display)
    said = console.export_text()
    assert "data      rows in chunks of 8 to train on, 4 held out" in said
    assert "steps     8 of 4 rows, padded to 8 tokens: at most 1 program to compile" in said
    rows.write_text(good)
    stopped_at(streamed, 7)
    console, display = quiet()
    run.train(streamed, rest, display)
    assert "resumed   after step 6 of 8" in console.export_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed"] == [4, 6]
    run.train(streamed, [*rest, f"output.folder={tmp_path / 'whole'}"], quiet()[1])
    same(tmp_path / "run", tmp_path / "whole")


def test_a_dry_run_counts_on_the_first_rows(streamed: Path) -> None:
    console, display = quiet()
    run.plan(streamed, [], display)
    said = console.export_text()
    assert "about 8 of 8 tokens a row" in said
    assert "run       about " in said


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (['{"text": "x", "answer": '], "line 10: not valid JSON"),
        (
            ['{"text": ["x"], "answer": "red"}'] * 3,
            "line 7: from here on column 'text' holds a list, before it held text",
        ),
        (['{"text": "a"}'] * 5, "line 7: the label is missing"),
    ],
)
def test_faults_of_later_rows(jsonl: Callable[..., Path], tokenizer: Any, bad: list[str], said: str) -> None:
    from train.examples import Reader

    path = jsonl(ROWS[:9] if len(bad) == 1 else ROWS[:6])
    path.write_text(path.read_text().rstrip("\n") + "\n" + "\n".join(bad))
    settings = data(path)
    streamed = Streamed(Stream(settings), task_of(settings), lambda: Reader(tokenizer, 32))
    with pytest.raises(JpeftError, match=said):
        list(zip(range(9), streamed.windows((0, 0, 0), (8, 32), 3, 5), strict=False))


@pytest.mark.parametrize(
    "empty", [{}, {"text": None, "answer": None}, {"answer": "red"}, {"text": "", "other": 1}], ids=repr
)
def test_a_chunk_of_rows_without_content_is_counted(jsonl: Callable[..., Path], tokenizer: Any, empty: Any) -> None:
    """As such rows are where others are read with them."""
    from train.examples import Reader

    settings = DataConfig(
        source=str(jsonl([*ROWS[:6], *[empty] * 4, *ROWS[6:]])), streaming=True, text="text", test_size=2, chunk=4
    )
    streamed = Streamed(Stream(settings), task_of(settings), lambda: Reader(tokenizer, 32))
    made = [window for _, window in zip(range(6), streamed.windows((0, 0, 0), (8, 32), 4, 5), strict=False)]
    assert [(window.chunk.epoch, window.chunk.number) for window in made] == [
        (0, 0), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)
    ]  # fmt: skip
    assert streamed.counts["rows without text left out"] >= 4


def test_a_chunk_without_words_is_counted(jsonl: Callable[..., Path], tokenizer: Any) -> None:
    from train.examples import Reader

    rows = [{"words": ["one", "two"], "tags": ["O", "B-X"]}] * 4
    settings = DataConfig(
        source=str(jsonl([*rows, *[{"words": None, "tags": None}] * 2, *rows])),
        **{"streaming": True, "tokens": "words", "tags": "tags", "labels": ["O", "B-X"], "test_size": 2, "chunk": 2},
    )
    streamed = Streamed(Stream(settings), task_of(settings), lambda: Reader(tokenizer, 32))
    made = [window.chunk.number for _, window in zip(range(4), streamed.windows((0, 0, 0), (8,), 2, 5), strict=False)]
    assert made == [0, 2, 3, 0]
    assert streamed.counts["rows without words left out"] == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.json", b'[{"text": "a"},\n {"text": "\xff"}]', "rows.json, line 2: not UTF-8 text"),
        ("rows.csv", b"text\na\nb\n\xff\n", "rows.csv, line 4: not UTF-8 text"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "rows.jsonl, line 2: not UTF-8 text"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    settings = DataConfig(source=str(tmp_path / name), streaming=True, text="text", test_size=1, chunk=4)
    with pytest.raises(JpeftError, match=said):
        list(Stream(settings).chunks(0))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_of_other_columns_are_refused_at_any_chunk(tmp_path: Path, kind: str) -> None:
    for name, rows in {"a": {"text": ["x"] * 4}, "b": {"text": ["x"] * 4, "more": ["y"] * 4}}.items():
        getattr(datasets.Dataset.from_dict(rows), f"to_{kind}")(str(tmp_path / f"{name}.{kind}"))
    for chunk in (3, 4):
        settings = DataConfig(source=str(tmp_path), streaming=True, text="text", chunk=chunk, test_source="other.csv")
        with pytest.raises(JpeftError, match="columns"):
            list(Stream(settings).chunks(0))


def test_a_type_that_no_table_has(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": ["a"], "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(JpeftError, match=r"rows\.parquet: cannot be read: .*map"):
        Stream(data(tmp_path / "rows.parquet")).first()


@pytest.mark.parametrize(("later", "said"), [(None, "row 3: cannot be read: gone"), (["x"], "row 3 to .*row 3: a col")])
def test_faults_of_the_hub(monkeypatch: pytest.MonkeyPatch, later: Any, said: str) -> None:
    class Table:
        features = None if later is None else datasets.Features({"text": datasets.Value("int64")})

        def __iter__(self) -> Any:
            yield from [{"text": 1}] * 3
            if later is None:
                raise ConnectionError("gone")
            yield {"text": later}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **given: Table())
    stream = Stream(DataConfig(source="who/rows", streaming=True, text="text", chunk=3, test_source="other.csv"))
    with pytest.raises(JpeftError, match=rf"who/rows \(train\), {said}"):
        list(stream.chunks(0))


def test_a_chunk_smaller_than_a_step_is_said(streamed: Path) -> None:
    console, display = quiet()
    run.plan(streamed, ["data.chunk=3"], display)
    said = " ".join(console.export_text().split())
    assert "warning data.chunk is 3, and its first rows give 3 to learn from, fewer than the 4 of a step" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        *((f"data.{key}={10**12}", "must be less than 2147483648") for key in ("chunk", "limit", "test_size")),
        *((f'{key}=""', f"{key}: '' .*at least 1 character") for key in ("data.source", "output.folder")),
        ('output.folder="a\\0b"', "output.folder: .* has a character of code 0"),
        *((f"{key}={10**30}", f"{key}: .* is too large") for key in ("data.chunk", "method.rank")),
        ("training.max_steps=2147483648", "must be less than 2147483648"),
        ("training.max_steps=null", "data.streaming: needs training.max_steps"),
        ("training.epochs=2", "data.streaming: needs training.max_steps, and no training.epochs"),
        ("data.test_size=0.1", "data.streaming: needs data.test_source, data.test_split, or a number of rows"),
        ("data.mix={other.jsonl: 1.0}", "data.mix: does not go with data.streaming"),
        ("data.streaming=false", "data.chunk: is for data.streaming"),
    ],
)
def test_keys_that_need_all_rows(streamed: Path, override: str, said: str) -> None:
    with pytest.raises(JpeftError, match=said):
        configs.load(streamed, [override])


def test_labels_are_given(streamed: Path) -> None:
    with pytest.raises(
        JpeftError, match=r"data.labels: the labels of .* cannot be found in rows that are not read yet"
    ):
        run.train(streamed, ["data.labels=null"], quiet()[1])
