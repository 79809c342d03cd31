"""The folder of a run: which files are in it, whose it is, and in what state a killed process left it.

config.yaml      the resolved configuration
identity.json    what the run was made of: rows, base, versions
before.json      scores and answers before training; after.json likewise, at the end
metrics.jsonl    one line a step and a line an evaluation (train.trackers), summary.json and report.html beside it
checkpoints/     what the run goes on from (train.checkpoints)
adapter/         the result; with it the run is finished
previous/        a run that stood here before `output.overwrite`; further ones in previous-2/, ...
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from jpeft.errors import JpeftError
from train import config as configs
from train import trackers
from train.schema import Config

CONFIG, IDENTITY = "config.yaml", "identity.json"
BEFORE, AFTER = "before.json", "after.json"
CHECKPOINTS, ADAPTER = "checkpoints", "adapter"
PREVIOUS = "previous"
_LOCK = ".lock"
# All that a run leaves that is killed as it begins: what is written before its metrics and configuration are there.
_AT_FIRST = {IDENTITY, f".{IDENTITY}.new", f".{CONFIG}.new"}
# What a run may go on without: bits may differ then, but what is learnt is the same.
_SOFT = ("versions", "devices", "processes")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into one that names the folder."""
    try:
        yield
    except OSError as error:
        raise JpeftError(f"output.folder: {path} cannot be written: {error.strerror or error}") from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a killed process, never sees half of it."""
    new = path.with_name(f".{path.name}.new")
    with writing(path.parent):
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that one process at a time writes, and that knows what its content was made of."""

    path: Path

    def identity(self) -> dict[str, str]:
        """What the content was made of; nothing if that was never written. Raises JpeftError for a damaged file."""
        path = self.path / IDENTITY
        if not path.is_file():
            return {}
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            return {str(key): str(value) for key, value in read.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise JpeftError(f"{path}: not what jpeft wrote there ({error}); give another output.folder") from None

    def identify(self, made_of: Mapping[str, str]) -> None:
        """Writes what the content is made of."""
        write_whole(self.path / IDENTITY, json.dumps(dict(made_of), indent=2) + "\n")

    def mixed(self, made_of: Mapping[str, str]) -> list[str]:
        """What, of all that must not be mixed, such as rows and base, `made_of` has otherwise than the content."""
        before = self.identity()
        return [key for key in made_of if key in before and key not in _SOFT and before[key] != made_of[key]]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing the same folder; the lock ends with the process, however it ends."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise JpeftError(
                f"output.folder: another process is writing {self.path}; wait for it, or give another folder"
            ) from None
        except OSError as error:
            raise JpeftError(f"output.folder: {self.path} cannot be written: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()


class RunFolder(Folder):
    """The folder of one run."""

    @property
    def adapter(self) -> Path:
        """The result, once the run is finished."""
        return self.path / ADAPTER

    @property
    def checkpoints(self) -> Path:
        """What the run goes on from."""
        return self.path / CHECKPOINTS

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.adapter.exists()

    def check_place(self) -> None:
        """Raises JpeftError for a folder that could never be written, before anything is loaded."""
        folder = self.path
        try:
            if folder.exists() and not folder.is_dir():
                raise JpeftError(f"output.folder: {folder} is a file")
            above = next(place for place in (folder, *folder.parents) if place.exists())
            if not above.is_dir() or not os.access(above, os.W_OK):
                raise JpeftError(f"output.folder: {folder} cannot be written: {above} is no folder or read-only")
        except OSError as error:
            raise JpeftError(f"output.folder: {folder} cannot be used: {error.strerror or error}") from None

    def check_config(self, config: Config) -> None:
        """Refuses a folder that holds a run of another configuration, or something that is no run.

        A run that has neither checkpoint nor result has nothing to lose: it may be replaced by any other.
        """
        folder, changed = self.path, self.changed(config)
        if changed and not config.output.overwrite:
            listed = "\n".join(f"  {line}" for line in changed)
            kind = "a" if self.finished else "an unfinished"
            raise JpeftError(
                f"output.folder: {folder} holds {kind} run of another configuration:\n{listed}\n"
                f"give another folder, or output.overwrite=true to move it to {folder / PREVIOUS}"
            )

    def changed(self, config: Config) -> list[str]:
        """How `config` differs from that of the run that stands here, if there is work of it.

        Raises JpeftError if what stands here is no run.
        """
        folder = self.path
        names = {child.name for child in folder.iterdir() if not _aside(child.name)} if folder.is_dir() else set()
        mine = IDENTITY in names and self.identity().keys() >= set(_SOFT)
        if not names or (names <= _AT_FIRST and (mine or IDENTITY not in names)):
            return []
        if not (mine and (folder / CONFIG).is_file()):
            raise JpeftError(f"output.folder: {folder} holds other files and no run; give an empty or new folder")
        return configs.difference(configs.load(folder / CONFIG), config) if self._has_work() else []

    def _has_work(self) -> bool:
        return self.finished or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def open(self, config: Config, made_of: Mapping[str, str]) -> list[str]:
        """Makes the folder ready: a run that goes on stays as it is, one that is replaced moves aside whole.

        config, made_of: of the run that begins or goes on. `output.overwrite` replaces what is finished or another
        run; an unfinished run of the same configuration goes on all the same. Returns what differs between this machine
        and the one that began the run, in words; bits may differ then. Raises JpeftError if the run that stands here
        was made of other rows or another base.
        """
        overwrite, before, hard = config.output.overwrite, self.identity(), self.mixed(made_of)
        if self._has_work() and hard and not overwrite:
            raise JpeftError(
                f"output.folder: {self.path} holds a run that began with other {', '.join(hard)} than the "
                "configuration leads to now; going on would mix the two. Give another folder, or "
                f"output.overwrite=true to move it to {self.path / PREVIOUS}"
            )
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if overwrite and self._has_work() and (self.finished or hard or self.changed(config)):
                self._move_aside()
            goes_on = self._has_work()
            if not goes_on:
                for name in (BEFORE, AFTER):
                    (self.path / name).unlink(missing_ok=True)
                self.identify(made_of)
            write_whole(self.path / CONFIG, configs.dumps(config))
            if not goes_on:
                (self.path / trackers.METRICS).write_text("", encoding="utf-8")
        soft = [key for key in made_of if goes_on and before.get(key) != made_of[key]]
        return [f"{key} was {before.get(key)}, is {made_of[key]}" for key in soft]

    def _move_aside(self) -> None:
        mine = [child for child in self.path.iterdir() if not _aside(child.name)]
        number = 1
        while (previous := self.path / (PREVIOUS if number == 1 else f"{PREVIOUS}-{number}")).exists():
            number += 1
        previous.mkdir()
        for child in mine:
            child.rename(previous / child.name)


def _aside(name: str) -> bool:
    """Whether a file of this name in the folder is no part of the run that stands there."""
    return name == _LOCK or name.split("-", maxsplit=1)[0] == PREVIOUS
