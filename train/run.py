"""`jpeft train`: from a configuration file to an adapter, with scores before, during and after."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import jpeft
from jpeft.checkpoint import fingerprint
from jpeft.errors import JpeftError
from train import config as configs
from train import dry_run, placing, processes, session, starts, summary, trackers
from train.data import TaskData
from train.display import Display, size
from train.ending import Ending, methods_of
from train.evaluate import Score
from train.examples import Example
from train.folder import AFTER, BEFORE, RunFolder
from train.launch import Group
from train.loop import Loop
from train.materials import Materials
from train.plan import Plan
from train.schema import Config


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves: its folder, the scores before and after, and the losses of the steps."""

    folder: Path
    before: Score
    after: Score
    losses: tuple[float, ...]


def train(
    path: Path, overrides: Sequence[str] = (), display: Display | None = None, group: Group | None = None
) -> Result:
    """Runs the configuration in `path` with `section.key=value` overrides, or goes on with it where it was stopped.

    Raises JpeftError for everything a user can mend; mistakes in the configuration and the data are found before the
    model is loaded. Raises `train.stopping.Stopped` after SIGTERM or Ctrl-C.

    group: the processes that this one is to join first. A program that has called `jax.distributed.initialize` itself
    leaves it out; what goes wrong in one process is then for the program to end.
    """
    made = _run(path, overrides, display or Display(), group, dry=False)
    assert made is not None
    return made


def plan(path: Path, overrides: Sequence[str] = (), display: Display | None = None, group: Group | None = None) -> None:
    """Says what the run would take, with every check that `train` makes; trains, writes and loads no weights.

    Raises JpeftError as `train` does.
    """
    _run(path, overrides, display or Display(), group, dry=True)


def _run(path: Path, overrides: Sequence[str], display: Display, group: Group | None, *, dry: bool) -> Result | None:
    started = time.monotonic()
    config = checked(configs.load(path, overrides))
    with processes.joined(group, config.mesh.heartbeat_timeout) if group else contextlib.nullcontext():
        if not processes.first():
            display = Display(Console(quiet=True))
        with processes.agreed():
            materials = Materials(config, abstract=dry)
        return carry_out(config, materials, display, started, dry=dry)


def checked(config: Config) -> Config:
    """`config` with absolute paths, when nothing that it names is missing; reads no rows yet. Raises JpeftError."""
    config = session.located(config)
    session.check_sources(config)
    trackers.check(config.output)
    RunFolder(Path(config.output.folder)).check_place()
    return config


def carry_out(
    config: Config, materials: Materials, display: Display, started: float | None = None, *, dry: bool = False
) -> Result | None:
    """A run from wherever its folder stands to its end, with rows and base from `materials`.

    config: checked. materials: of a configuration with the same model and data. started: by the monotonic clock. dry:
    say what the run would take instead, without arrays; the only case without a result.
    """
    started = time.monotonic() if started is None else started
    config = config.model_copy(update={"data": materials.data})
    folder = RunFolder(Path(config.output.folder))
    if not dry and processes.from_first(lambda: _is_finished(config, folder)):
        return _finished(folder, display)
    session.keep_compiled()

    streamed = materials.train_rows.stream is not None
    many = f"rows in chunks of {config.data.chunk:,}" if streamed else f"{len(materials.train_rows):,} rows"
    counted = f"{many} to train on, {len(materials.test_rows):,} held out"
    display.say(f"data      {counted}, from {config.data.source}")
    with processes.agreed():
        materials.base.tokenizer()  # one that is missing is said before weights are read
    model = adapted(config, materials)
    described = jpeft.describe(model)
    display.say(f"model     {config.model.source}, {described.total - described.trainable:,} frozen parameters")
    display.say(
        f"method    {methods_of(config)}: {described.trainable:,} trainable parameters "
        f"({100 * described.trainable / described.total:.2f}%, {size(described.trainable_bytes)})"
    )
    task = materials.examples(model)
    for name, counts in task.counts.items():
        for what, count in counts.items():
            display.say(f"warning   {name}: {count} {what}")
    mesh = materials.base.mesh
    if mesh is not None:
        sizes = ", ".join(f"{axis} {count}" for axis, count in mesh.shape.items())
        count = jax.process_count()
        display.say(f"mesh      {mesh.size} devices{f' of {count} processes' * (count > 1)}: {sizes}")
    elif jax.device_count() > 1:
        display.say(f"warning   {jax.device_count()} devices are here and 1 is used; mesh.data=-1 uses all of them")
    if config.training.offload and (reason := placing.missing_host_memory()):
        display.say(f"warning   training.offload: {reason}; the run goes on without")
    if dry:
        dry_run.show_targets(config, model, display)
        dry_run.show(Plan(config, model, task), model, task.kind, display, mesh)
        return None
    loop = Loop(config, model, task, materials.reader(model), folder, display, mesh)
    facts = made_of(model, task)
    _check_same(facts)
    with contextlib.ExitStack() as held:
        with processes.agreed():
            if processes.first():
                held.enter_context(folder.locked())
                for changed in folder.open(config, facts):
                    display.say(f"warning   {changed} since the run began; what follows may differ in its last bits")
        display.say(loop.plan.sentence(loop.evaluator.shapes))
        steps, shapes = loop.plan.steps, loop.plan.shapes
        ending = Ending(config, task, described, steps, shapes, folder, display, session.mergeable(model))
        if processes.first():
            ending.begin()
        setup = time.monotonic() - started
        before, after = loop.run()
        jpeft.save_adapter(folder.adapter, loop.model, overwrite=True)
        if processes.first():
            ending.report(before, after, {"setup": setup, **loop.seconds}, started, loop.state.notes["resumed"])
    return _result(folder, before, after)


def _is_finished(config: Config, folder: RunFolder) -> bool:
    folder.check_config(config)
    return folder.finished and not config.output.overwrite


def _check_same(facts: Mapping[str, str]) -> None:
    """Raises JpeftError, on all processes, where one was given other rows, weights or versions than the first."""
    wanted = processes.from_first(lambda: facts)
    with processes.agreed():
        different = [key for key in facts if facts[key] != wanted[key]]
        if different:
            raise JpeftError(
                f"{', '.join(different)} differ from those of the first process; every process must find the same files"
            )


def adapted(config: Config, materials: Materials) -> Any:
    """The model as a run of `config` begins with it: base, and the method as its seed makes it."""
    base, made = materials.base, starts.adapted(config, materials)
    if placing.offloads(config.training, "activations"):
        made = jpeft.offload(made)
    return made if base.mesh is None else jpeft.shard(made, base.mesh, base.rules)


def made_of(model: Any, task: TaskData) -> dict[str, str]:
    """What a run depends on beside its configuration: hashes of its rows and of its base, versions and devices."""
    machine = summary.machine()
    return {
        "training rows": _hash_rows(task.train),
        "held-out rows": _hash_rows(task.test),
        "base model": hashlib.sha256(json.dumps(fingerprint(model), sort_keys=True).encode()).hexdigest(),
        "versions": json.dumps(machine["versions"]),
        "devices": json.dumps(machine["devices"]),
        "processes": str(jax.process_count()),
    }


def _hash_rows(examples: Sequence[Example]) -> str:
    """One hash of what is learnt from the rows, in their order."""
    made = hashlib.sha256()
    for example in examples:
        for field in dataclasses.fields(example):
            value = getattr(example, field.name)
            content = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
            made.update(b"%d:" % len(content) + content)
    return made.hexdigest()


def _finished(folder: RunFolder, display: Display) -> Result:
    before, after = (Score(**json.loads((folder.path / name).read_text(encoding="utf-8"))) for name in (BEFORE, AFTER))
    metric = next(iter(after.metrics))
    display.say(
        f"finished  {folder.path} holds this run already: {metric} {before.metrics[metric]:.3f} before, "
        f"{after.metrics[metric]:.3f} after. output.overwrite=true trains it again"
    )
    return _result(folder, before, after)


def _result(folder: RunFolder, before: Score, after: Score) -> Result:
    entries, _ = trackers.read(folder.path / trackers.METRICS)
    return Result(folder.path, before, after, tuple(entry["loss"] for entry in entries if "loss" in entry))
