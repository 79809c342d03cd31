"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when the configuration asks.

A run makes one record after another. Each becomes a line of metrics.jsonl, and the same records go to every other
tracker, so all of them show the same numbers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from jpeft.errors import JpeftError
from train.schema import Config, OutputConfig

METRICS, TENSORBOARD, WANDB_ID = "metrics.jsonl", "tensorboard", "wandb-id.txt"

Record = Mapping[str, Any]


class Tracker(Protocol):
    """Something that keeps the records of a run."""

    def record(self, entry: Record) -> None:
        """Keeps one record: `{"step": 3, "loss": ...}` of a step, `{"step": 3, "evaluation": {...}}` of a score."""

    def close(self) -> None:
        """Nothing more will come."""


class Trackers:
    """All trackers of a run as one. A context manager, which closes them.

    had: records that all of them have; one like them (of the same step and kind) is not recorded a second time.
    """

    def __init__(self, had: Iterable[Record] = ()):
        self._had = {_kind(entry) for entry in had}
        self._trackers: list[Tracker] = []
        self._open = contextlib.ExitStack()

    def add(self, tracker: Tracker) -> None:
        """One more, closed with the others."""
        self._trackers.append(tracker)
        self._open.callback(tracker.close)

    def record(self, entry: Record) -> None:
        """Gives `entry` to each tracker."""
        if _kind(entry) in self._had:
            return
        for tracker in self._trackers:
            tracker.record(entry)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()


def _kind(entry: Record) -> tuple[int, bool]:
    return entry["step"], "evaluation" in entry


def check(output: OutputConfig) -> None:
    """Raises JpeftError if a tracker that is asked for is not installed; imports none of them."""
    wanted = {"tensorboard": output.tensorboard, "wandb": output.wandb is not None}
    for name in (name for name, asked in wanted.items() if asked and not _installed(name)):
        raise JpeftError(f"output.{name}: the package {name} is not installed; pip install {name}")


def _installed(name: str) -> bool:
    # A folder of that name in the working directory, as both leave, looks like a package without an origin.
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def open_trackers(config: Config, folder: Path, *, after: int = 0) -> Trackers:
    """The trackers of the run in `folder`, which exists.

    after: the step from which a run goes on; what earlier records say of later steps is dropped everywhere. With 0 they
    begin anew. Raises JpeftError if the folder cannot be written or a tracker is not installed.
    """
    check(config.output)
    lines = JsonLines(folder / METRICS, after)
    made = Trackers(lines.kept)
    with contextlib.ExitStack() as failed:
        failed.push(made)
        made.add(lines)
        if config.output.tensorboard:
            made.add(TensorBoard(folder / TENSORBOARD, lines.kept))
        else:
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        if config.output.wandb is not None:
            made.add(WandB(config, folder, resumed=after > 0))
        failed.pop_all()
    return made


class JsonLines:
    """One record a line, on disk when `record` returns. kept: the records that stood there up to step `after`."""

    def __init__(self, path: Path, after: int = 0):
        self._path = path
        self.kept = [entry for entry in read(path)[0] if entry["step"] <= after] if after else []
        try:
            # A line that a kill cut short goes with those after the step.
            beside = path.with_name(path.name + ".new")
            beside.write_text("".join(json.dumps(entry) + "\n" for entry in self.kept), encoding="utf-8")
            beside.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._fault(error) from None

    def record(self, entry: Record) -> None:
        try:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._fault(error) from None

    def close(self) -> None:
        self._file.close()

    def _fault(self, error: OSError) -> JpeftError:
        return JpeftError(f"output.folder: {self._path} cannot be written: {error.strerror or error}")


def read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(the records of a metrics.jsonl, the numbers of lines that are none); of a file that is not there, nothing.

    A run that was killed may have left half a line; nothing else is expected, and everything is put up with.
    """
    entries, broken = [], []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise JpeftError(f"{path}: cannot be read: {error.strerror or error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and type(entry.get("step")) is int and 0 <= entry["step"] < 2**53:
            entries.append(entry)
        else:
            broken.append(number)
    return entries, broken


def scalars(entry: Record) -> Iterator[tuple[str, float]]:
    """(tag, value) of every number in a record: `train/loss`, `train/learning_rate/head`, `evaluation/accuracy`."""
    for name, value in entry.items():
        if name == "evaluation":
            yield from _flat("evaluation", value)
        elif name not in ("step", "seconds", "tokens"):
            yield from _flat(f"train/{name}", value)


def _flat(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{tag}/{name}", inner)
    elif isinstance(value, int | float):
        yield tag, float(value)


class TensorBoard:
    """Event files for `tensorboard --logdir`, by TensorBoard's own writer; TensorFlow is not needed.

    Event files are written in blocks, so a kill loses some events of steps that a checkpoint has. That is why they are
    made anew from the records kept whenever a run goes on.
    """

    def __init__(self, folder: Path, kept: Iterable[Record] = ()):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._writer = EventFileWriter(str(folder))
        except OSError as error:
            raise JpeftError(f"output.folder: {folder} cannot be written: {error.strerror or error}") from None
        for entry in kept:
            self.record(entry)

    def record(self, entry: Record) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(entry)]
        event = self._event(step=entry["step"], wall_time=time.time(), summary=self._summary(value=values))
        self._writer.add_event(event)
        if "evaluation" in entry:
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the Weights & Biases project that the configuration names; its id is kept in the folder.

    A run that goes on sends some steps twice. They are equal, and Weights & Biases keeps the first.
    """

    def __init__(self, config: Config, folder: Path, *, resumed: bool):
        import wandb

        path = folder / WANDB_ID
        if not (resumed and path.exists()):
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        try:
            self._run = wandb.init(
                project=config.output.wandb,
                id=path.read_text(encoding="utf-8").strip(),
                name=folder.name,
                dir=str(folder),
                config=config.model_dump(mode="json"),
                resume="allow",
            )
        except Exception as error:  # its own kinds of error differ by version
            raise JpeftError(
                f"output.wandb: Weights & Biases did not begin the run: {error} (wandb login, or WANDB_MODE=offline)"
            ) from error

    def record(self, entry: Record) -> None:
        self._run.log(dict(scalars(entry)), step=entry["step"])

    def close(self) -> None:
        self._run.finish()
