"""`jpeft eval`: the score of a finished run, or of its base, on rows of any file, and what it says to each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jpeft
from jpeft.errors import JpeftError
from train import batches, session, sources
from train.data import TaskData, rows_of
from train.evaluate import Evaluator, Score
from train.files import Rows
from train.session import Run
from train.tasks import check_columns


def evaluate(
    folder: Path,
    source: str | None = None,
    *,
    adapted: bool = True,
    limit: int | None = None,
    output: Path | None = None,
) -> Iterator[str]:
    """Lines that say how the run in `folder` scores.

    source: file, package or hub id of the rows, with the columns that the run was trained on; default: the rows that
    were held out from its training. adapted: with the adapter; without, a head that the checkpoint lacks is as it was
    before training. limit: rows to score at most. output: a new file for the predictions, one JSON object a row.

    Raises JpeftError for rows that do not fit the run, and if `output` exists or cannot be written.
    """
    if output is not None:
        _check_new(output)
    session.keep_compiled()
    run = session.open_run(folder, adapted=adapted)
    data = run.config.data
    train, test = (None, sources.read(source)) if source is not None else rows_of(data, run.task)
    if limit is not None:
        test = test.select(range(min(limit, len(test))))
    check_columns(run.task, test)
    run.task.check(test)
    task = task_of(run, train, test)
    for what, count in task.counts["held-out"].items():
        yield f"warning   {count} {what}"
    score = score_of(run, task)
    name = "adapter" if adapted else "base"
    yield f"{name:<9} {score} ({len(task.test):,} rows of {test.name})"
    if output is not None:
        count = _write(output, task, score)
        yield (
            f"written   {count:,} predictions to {output}"
            if count
            else "warning   the run's task predicts nothing to write"
        )


def task_of(run: Run, train: Rows | None, test: Rows) -> TaskData:
    """What `run` is asked of the rows of `test`; train: its training rows where they are at hand."""
    examples = run.task.examples(test, run.reader)
    counts = +run.reader.counts
    if not examples:
        said = "; ".join(f"{count} {what}" for what, count in counts.items()) or "there are none"
        raise JpeftError(f"{test.name}: no rows are left to score: {said}")
    if train is None:  # whose completions are the choices of evaluation.answers=choose
        train = rows_of(run.config.data, run.task)[0] if run.config.evaluation.answers == "choose" else test
    return TaskData(run.task, [], examples, train, test, {"held-out": counts})


def score_of(run: Run, task: TaskData) -> Score:
    """How the model of `run` does at it."""
    graphdef, adapter, buffers, frozen = jpeft.partition(run.model)
    lengths = [len(example) for example in task.test]
    size = run.config.evaluation.batch_size or 4 * run.config.training.batch_size
    parts = (graphdef, buffers, frozen)
    return Evaluator(parts, task, run.reader, run.config.evaluation, batches.edges(lengths), size)(adapter)


def _check_new(path: Path) -> None:
    if path.exists():
        raise JpeftError(f"--output: {path} exists; give a new file")
    if not path.absolute().parent.is_dir():
        raise JpeftError(f"--output: the folder of {path} does not exist")


def _write(path: Path, task: TaskData, score: Score) -> int:
    if not score.answers:
        return 0
    wanted = task.shown(task.right)
    right = task.kind.agree(score.answers, wanted)
    rows = zip(task.test, task.asked, wanted, score.answers, right, strict=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            for example, asked, good, said, hit in rows:
                place = task.test_rows.place(example.row)
                entry = {"row": place, "input": asked, "wanted": good, "predicted": said, "right": bool(hit)}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    except OSError as error:
        raise JpeftError(f"--output: {path} cannot be written: {error.strerror or error}") from None
    return len(score.answers)
