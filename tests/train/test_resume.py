"""A run that is killed, stopped or starved of disk goes on where it was, bit for bit."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import jpeft
from jpeft import JpeftError
from train import folder as run_folder
from train import session, trackers
from train.checkpoints import Checkpoints
from train.display import Display
from train.run import train
from train.stopping import Stopped, Stopping

KILLS = 20


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Starts processes that have imported everything already and have no JAX backend yet."""
    context = multiprocessing.get_context("forkserver")
    heavy = ["orbax.checkpoint.experimental.v1", "datasets", "transformers.models.auto.tokenization_auto"]
    context.set_forkserver_preload(["train.run", *heavy])
    return context


@pytest.fixture
def config(bert: Path, jsonl: Callable[..., Path], config_file: Callable[..., Path], tmp_path: Path) -> Path:
    """128 steps with all that a step may depend on: dropout, accumulation, buckets of length, the best so far."""
    colours = [("red", "green", "blue")[number % 3] for number in range(72)]
    rows = jsonl([{"text": f"the {c} {'one two ' * (i % 7)}is", "answer": c} for i, c in enumerate(colours)])
    return config_file(
        f"model: {{source: {bert}, task: sequence-classification, pooling: mean}}\n"
        "method: {name: lora, rank: 4, targets: [query, value], dropout: 0.1}\n"
        f"data: {{source: {rows}, text: text, label: answer, test_size: 12, max_length: 32}}\n"
        "training: {epochs: 16, batch_size: 4, accumulation: 2, learning_rate: 3e-3}\n"
        "evaluation: {every: 20, best: loss, samples: 2}\n"
        "checkpoints: {every: 4}\n"
        f"output: {{folder: {tmp_path / 'run'}}}\n"
    )


def quiet() -> Display:
    return Display(Console(quiet=True))


def in_child(config: Path, overrides: list[str], log: Path) -> None:
    """`jpeft train` in a process of its own; what it prints goes to `log`."""
    with log.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    from train.cli import app

    app(["train", str(config), *overrides])


@pytest.fixture
def start(server: ForkServerContext, config: Path, tmp_path: Path) -> Iterator[Callable[..., ForkServerProcess]]:
    """Starts the run of `config` in another process."""
    started = []

    def begin(*overrides: str) -> ForkServerProcess:
        process = server.Process(target=in_child, args=(config, list(overrides), tmp_path / "log.txt"))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    return {key: np.asarray(value) for key, value in jpeft.partition(session.open_run(folder).model).adapter.items()}


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without what depends on the clock."""
    entries, broken = trackers.read(folder / trackers.METRICS)
    assert not broken
    return [{k: v for k, v in entry.items() if k not in ("seconds", "tokens_per_second")} for entry in entries]


def same(one: Path, other: Path) -> None:
    """Asserts that two runs left the same adapter and the same records, bit for bit."""
    first, second = adapter_of(one), adapter_of(other)
    assert first.keys() == second.keys()
    assert [key for key in first if first[key].tobytes() != second[key].tobytes()] == []
    assert numbers(one) == numbers(other)


def wait_for(condition: Callable[[], bool], process: ForkServerProcess) -> bool:
    """Whether `condition` came true before the process ended."""
    until = time.monotonic() + 120
    while process.is_alive():
        with contextlib.suppress(FileNotFoundError):  # what Orbax is renaming at this moment
            if condition():
                return True
        assert time.monotonic() < until
        time.sleep(0.001)
    return False


def test_killed_at_twenty_moments(config: Path, start: Callable[..., ForkServerProcess], tmp_path: Path) -> None:
    chosen = random.Random(7)
    run, whole, log = tmp_path / "run", tmp_path / "whole", tmp_path / "log.txt"
    checkpoints = run / run_folder.CHECKPOINTS
    reference = start(f"output.folder={whole}")
    reference.join()
    assert reference.exitcode == 0, log.read_text()[-2000:]

    def steps() -> set[int]:
        return {int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()}

    def resumed() -> int:
        """How many processes have gone on from a checkpoint, and removed what was half written before."""
        return log.read_text().count("resumed   after step")

    kills = saving = expected = 0
    while kills < KILLS:
        stood = steps()
        expected += bool(stood)
        process = start()
        # A third of the kills comes while a checkpoint is half written, the others a moment after one became whole.
        half = kills % 3 == 0

        def now(stood: set[int] = stood, half: bool = half, expected: int = expected) -> bool:
            if resumed() < expected:  # half a checkpoint may be left from the kill before
                return False
            return any(checkpoints.glob("*tmp*")) if half else bool(steps() - stood)

        reached = wait_for(now, process)
        time.sleep(0 if half else chosen.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed often enough"
        kills += reached
        saving += half and steps() == stood
    last = start()
    last.join()
    assert last.exitcode == 0, log.read_text()[-2000:]
    assert saving >= KILLS // 4
    assert resumed() == expected + 1 >= KILLS - 1  # the first kill may come before there is a checkpoint
    same(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(
    config: Path, start: Callable[..., ForkServerProcess], tmp_path: Path, number: signal.Signals
) -> None:
    """It saves the step it is in, says so, and ends with 128 and the signal's number."""
    log, metrics = tmp_path / "log.txt", tmp_path / "run" / trackers.METRICS
    process = start("checkpoints.every=1000", "training.max_steps=60")
    assert wait_for(lambda: metrics.is_file() and '"step": 3,' in metrics.read_text(), process)
    os.kill(process.pid or 0, number)
    process.join()
    assert process.exitcode == 128 + number
    said = log.read_text()
    stopped = int(said.split(f"stopped   by {number.name} after step ")[1].split()[0])
    assert f"step {stopped} of 60, which is saved; the same command goes on from there" in " ".join(said.split())
    assert len([entry for entry in numbers(tmp_path / "run") if "loss" in entry]) == stopped
    assert [path.name for path in (tmp_path / "run" / run_folder.CHECKPOINTS).iterdir()] == [str(stopped)]
    with pytest.raises(JpeftError, match="not finished"):
        session.open_run(tmp_path / "run")
    if number == signal.SIGTERM:
        train(config, ["checkpoints.every=1000", "training.max_steps=60"], quiet())
        train(config, ["training.max_steps=60", f"output.folder={tmp_path / 'whole'}"], quiet())
        same(tmp_path / "run", tmp_path / "whole")


class Stop(Exception):
    """Ends a run in the middle, as an error of any kind would."""


def stopped_at(config: Path, step: int, *overrides: str) -> None:
    """Trains until just before `step`, with a checkpoint every 2 steps."""
    with pytest.MonkeyPatch.context() as patch:
        due = Checkpoints.due

        def end(self: Checkpoints, number: int) -> bool:
            if number == step:
                raise Stop
            return due(self, number)

        patch.setattr(Checkpoints, "due", end)
        with pytest.raises(Stop):
            train(config, ["checkpoints.every=2", "training.max_steps=8", *overrides], quiet())


def test_what_a_run_cannot_go_on_with(config: Path, tmp_path: Path) -> None:
    stopped_at(config, 7)
    run, rest = tmp_path / "run", ["checkpoints.every=2", "training.max_steps=8"]
    before = (run / trackers.METRICS).read_bytes()

    # Another configuration, other rows: refused with the difference; the run stays as it is.
    with pytest.raises(JpeftError, match=r"unfinished run of another .*:\n  training.learning_rate: 0.003 ->"):
        train(config, [*rest, "training.learning_rate=1e-3"], quiet())
    rows = next(tmp_path.glob("rows.jsonl"))
    text = rows.read_text()
    rows.write_text(text.replace("the red", "the very red"))
    with pytest.raises(JpeftError, match="began with other training rows, held-out rows than"):
        train(config, rest, quiet())
    rows.write_text(text)
    assert (run / trackers.METRICS).read_bytes() == before

    # Somebody else is at it.
    with run_folder.RunFolder(run).locked(), pytest.raises(JpeftError, match="another process is writing"):
        train(config, rest, quiet())

    # A damaged checkpoint is passed over with a word; none that can be read is an error that says what to do.
    steps = sorted(int(path.name) for path in (run / run_folder.CHECKPOINTS).iterdir())
    assert steps == [4, 6]
    damage(run / run_folder.CHECKPOINTS / "6")
    console = Console(record=True, width=200, file=io.StringIO())
    result = train(config, rest, Display(console))
    said = console.export_text()
    assert "the checkpoint of step 6 cannot be read" in said
    assert "resumed   after step 4 of 8" in said
    assert '<th scope="row">Resumed</th><td><bdi>after step 4</bdi>' in (run / "report.html").read_text()
    whole = train(config, [*rest, f"output.folder={tmp_path / 'whole'}"], quiet())
    assert result.losses == whole.losses
    same(run, tmp_path / "whole")


def test_a_mixture_goes_on_within_and_between_epochs(config: Path, tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    """8 rows and 4 of 7 others make an epoch of 4 steps of 3 rows; the run is stopped after 4 steps and after 6."""
    rows = jsonl([{"text": f"the {c} is", "answer": c} for c in ("red", "green", "blue") * 3], "few.jsonl")
    more = jsonl(
        [{"text": f"{c} what", "answer": c, "from": 1} for c in ("red", "blue", "blue", "green") * 2][:7], "more.jsonl"
    )
    mixed = [f"data.source={rows}", f"data.mix={{{more}: 0.5}}", "data.test_size=1"]
    mixed += ["training.epochs=4", "training.batch_size=3", "training.accumulation=1"]
    stopped_at(config, 5, *mixed)
    stopped_at(config, 7, *mixed)
    console = Console(record=True, width=300, file=io.StringIO())
    rest = [*mixed, "checkpoints.every=2", "training.max_steps=8"]
    train(config, rest, Display(console))
    said = console.export_text()
    assert "resumed   after step 6 of 8" in said
    assert f"mixture   12 rows in an epoch: 8 of {rows}, 4 of {more}" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed"] == [4, 6]
    train(config, [*rest, f"output.folder={tmp_path / 'whole'}"], quiet())
    same(tmp_path / "run", tmp_path / "whole")


def damage(checkpoint: Path) -> None:
    """Cuts every file of a checkpoint short."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:20])


def test_no_checkpoint_can_be_read(config: Path, tmp_path: Path) -> None:
    stopped_at(config, 5)
    for checkpoint in (tmp_path / "run" / run_folder.CHECKPOINTS).iterdir():
        damage(checkpoint)
    rest = ["checkpoints.every=2", "training.max_steps=8"]
    with pytest.raises(JpeftError, match=r"no checkpoint can be read .*output.overwrite=true"):
        train(config, rest, quiet())


def in_starved_child(config: Path, log: Path, bytes_left: int) -> None:
    """A run in a process that may write no file larger than `bytes_left`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        train(config, ["checkpoints.every=2", "training.max_steps=8"], quiet())
    except Exception as error:
        log.write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(2) from None


def test_a_full_disk(config: Path, server: ForkServerContext, tmp_path: Path) -> None:
    """The run ends with the folder and the reason; with room on the disk it goes on from what it had."""
    stopped_at(config, 7)
    process = server.Process(target=in_starved_child, args=(config, tmp_path / "error.txt", 8_000))
    process.start()
    process.join()
    assert process.exitcode == 2
    said = (tmp_path / "error.txt").read_text()
    assert said.startswith("JpeftError")
    assert "a checkpoint cannot be written: " in said
    assert "the checkpoint of step 6 stays" in said
    console = Console(record=True, width=200, file=io.StringIO())
    train(config, ["checkpoints.every=2", "training.max_steps=8"], Display(console))
    assert "resumed   after step 6 of 8" in console.export_text()


def test_signals_wait_for_what_must_not_be_cut() -> None:
    done = []

    def steps() -> None:
        with Stopping() as stopping:
            with stopping.held():
                signal.raise_signal(signal.SIGTERM)
                done.append("step")
            done.append("never")

    with pytest.raises(Stopped) as stopped:
        steps()
    assert done == ["step"]
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with Stopping(), pytest.raises(Stopped):
        signal.raise_signal(signal.SIGINT)
