"""Two processes train one model: as one would, through a kill and a signal, and on one process from where they were."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import jpeft
from tests.train.test_resume import numbers
from train import folder as run_folder
from train import session
from train.display import Display
from train.launch import OTHER_ENDED, Group, group_of
from train.run import train

HEARTBEAT = 6  # seconds
STEPS = 24

Pair = tuple[ForkServerProcess, ForkServerProcess]


def in_child(config: Path, overrides: list[str], number: int, port: int, log: Path) -> None:
    """`jpeft train` as one of two processes with two devices each; what it prints goes to `log`."""
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    from train.cli import main

    place = ["--processes", "2", "--process-id", str(number), "--coordinator", f"localhost:{port}"]
    sys.argv = ["jpeft", "train", str(config), *place, *overrides]
    main()


@pytest.fixture
def config(bert: Path, jsonl: Callable[..., Path], config_file: Callable[..., Path], tmp_path: Path) -> Path:
    """Rows of one length, so that there is one program; eleven held-out rows do not fill their batches."""
    rows = jsonl([{"text": f"the {c} one is", "answer": c} for c in ("red", "blue", "green", "maybe") * 11])
    return config_file(
        f"model: {{source: {bert}, task: sequence-classification, pooling: mean}}\n"
        "method: {name: lora, rank: 4, targets: [query, value], dropout: 0.1}\n"
        f"data: {{source: {rows}, text: text, label: answer, test_size: 11, max_length: 32}}\n"
        f"training: {{max_steps: {STEPS}, batch_size: 8, learning_rate: 3e-3}}\n"
        "evaluation: {every: 1000, samples: 2}\n"
        "checkpoints: {every: 4}\n"
        f"mesh: {{data: 2, fsdp: 2, rules: {{word_embeddings: []}}, heartbeat_timeout: {HEARTBEAT}}}\n"
        f"output: {{folder: {tmp_path / 'run'}}}\n"
    )


@pytest.fixture
def start(config: Path, tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Starts the run of `config` in two processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train.run", "orbax.checkpoint.experimental.v1", "datasets", "transformers.models.auto.tokenization_auto"]
    )
    started: list[ForkServerProcess] = []

    def begin(*overrides: str, second: tuple[str, ...] = ()) -> Pair:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        made = []
        for number in range(2):
            own = [*overrides, *second] if number else list(overrides)
            arguments = (config, own, number, port, tmp_path / f"log{number}.txt")
            made.append(context.Process(target=in_child, args=arguments))
            made[-1].start()
        started.extend(made)
        return made[0], made[1]

    yield begin
    for process in started:
        process.kill()


def ended(pair: Pair, folder: Path) -> list[int | None]:
    """The exit codes of both."""
    for process in pair:
        process.join(300)
    codes = [process.exitcode for process in pair]
    assert None not in codes, said(folder)
    return codes


def said(folder: Path) -> str:
    return "\n".join((folder / f"log{number}.txt").read_text()[-3000:] for number in range(2))


def reaches(step: int, folder: Path, pair: Pair) -> None:
    """Waits until the run in `folder` has a checkpoint of `step` or a later one."""
    until = time.monotonic() + 300
    while True:
        assert time.monotonic() < until, said(folder.parent)
        assert all(process.is_alive() for process in pair), said(folder.parent)
        with contextlib.suppress(FileNotFoundError):
            done = [int(path.name) for path in (folder / run_folder.CHECKPOINTS).iterdir() if path.name.isdigit()]
            if done and max(done) >= step:
                return
        time.sleep(0.01)


def test_two_processes(config: Path, start: Callable[..., Pair], tmp_path: Path) -> None:
    run, whole, alone = tmp_path / "run", tmp_path / "whole", tmp_path / "alone"
    assert ended(start(f"output.folder={whole}"), tmp_path) == [0, 0], said(tmp_path)
    assert "4 devices of 2 processes: data 2, fsdp 2" in (tmp_path / "log0.txt").read_text()
    assert "step" not in (tmp_path / "log1.txt").read_text(), "only the first process speaks"

    # One is killed: the other says so in time and leaves what both go on from.
    pair = start()
    reaches(4, run, pair)
    pair[1].kill()
    begun = time.monotonic()
    pair[0].join(120)
    assert pair[0].exitcode == OTHER_ENDED, said(tmp_path)
    assert time.monotonic() - begun < HEARTBEAT + 15
    assert "another of its processes ended" in (tmp_path / "log0.txt").read_text()

    # One is asked to stop: both do, after the same step.
    pair = start()
    reaches(12, run, pair)
    os.kill(pair[1].pid or 0, signal.SIGTERM)
    assert ended(pair, tmp_path) == [128 + signal.SIGTERM] * 2, said(tmp_path)
    last = max(int(path.name) for path in (run / run_folder.CHECKPOINTS).iterdir())
    assert f"stopped   by SIGTERM after step {last} of {STEPS}" in (tmp_path / "log0.txt").read_text()
    shutil.copytree(run, alone)

    # The same command goes on, bit for bit.
    assert ended(start(), tmp_path) == [0, 0], said(tmp_path)
    base = session.open_run(whole, adapted=False).model

    def adapter_of(folder: Path) -> dict[str, np.ndarray]:
        parts = jpeft.partition(jpeft.load_adapter(folder / run_folder.ADAPTER, base))
        return {key: np.asarray(value) for key, value in parts.adapter.items()}

    wanted, found = adapter_of(whole), adapter_of(run)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if found[key].tobytes() != wanted[key].tobytes()] == []
    assert numbers(run) == numbers(whole)
    assert (tmp_path / "log0.txt").read_text().count("resumed   after step") == 2

    # One process goes on from there as well, without a mesh, and scores the rows alike.
    console = Console(record=True, width=300, file=io.StringIO())
    result = train(
        config, [f"output.folder={alone}", "mesh.data=1", "mesh.fsdp=1", "mesh.rules=null"], Display(console)
    )
    told = console.export_text()
    assert f"resumed   after step {last} of {STEPS}" in told
    assert "processes was 2, is 1" in told
    for name, score in (("before", result.before), ("after", result.after)):
        other = json.loads((whole / f"{name}.json").read_text())
        assert score.answers == other["answers"]
        for metric, value in other["metrics"].items():
            np.testing.assert_allclose(score.metrics[metric], value, rtol=1e-5)
    losses = [entry["loss"] for entry in numbers(whole) if "loss" in entry]
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    found = adapter_of(alone)
    for key, array in wanted.items():
        np.testing.assert_allclose(found[key], array, rtol=1e-4, atol=1e-5, err_msg=key)


def test_what_one_process_cannot_read_ends_both(start: Callable[..., Pair], tmp_path: Path) -> None:
    pair = start(second=(f"data.source={tmp_path / 'missing.jsonl'}",))
    assert ended(pair, tmp_path) == [2, 2], said(tmp_path)
    for number in range(2):
        told = (tmp_path / f"log{number}.txt").read_text()
        assert "error: process 1: " in told
        assert "missing.jsonl" in told
    assert not (tmp_path / "run").exists()


def test_which_processes_there_are() -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert group_of(None, None, None, {}) is None
    assert group_of("1", None, None, {}) is None
    assert group_of("2", 1, "host:1", {}) == Group("host:1", 2, 1)
    assert group_of("auto", None, None, {}) == Group()
    assert group_of(None, None, None, {**slurm, "SLURM_NTASKS": "2"}) == Group()
    assert group_of(None, None, None, {**slurm, "SLURM_NTASKS": "1"}) is None, "an interactive step"
    assert group_of(None, None, None, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}) is None, "the batch script itself"
    assert group_of(None, None, None, {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}) == Group()
    assert group_of(None, None, None, {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert group_of("2", None, None, {**slurm, "SLURM_NTASKS": "2"}) == Group(None, 2, None)
    for options, words in [
        (("two", 0, "host:1"), "--processes: 'two'"),
        (("2", 2, "host:1"), "--process-id: 2 is not among the 2"),
        (("2", None, "host:1"), "--process-id: no launcher"),
        (("2", 0, None), "--coordinator: no launcher"),
        ((None, 0, None), "--process-id: give --processes as well"),
        ((None, None, "host:1"), "--coordinator: give --processes as well"),
    ]:
        with pytest.raises(ValueError, match=words):
            group_of(*options, {})
