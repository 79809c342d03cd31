"""`jpeft train`: from a configuration file to an adapter, with scores before, during and after."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jpeft
from jpeft.errors import JpeftError
from train import batches, session, summary, trackers
from train import config as configs
from train import data as task_data
from train import samples as held_out
from train.data import TaskData
from train.display import Display, Meter, clock, size
from train.evaluate import Evaluator, Score
from train.examples import Reader
from train.report import REPORT, write_report
from train.samples import Sample, shortened
from train.schema import Config
from train.step import make_step, optimizer, rates
from train.tasks import task_of
from train.trackers import Trackers

# What else a run may leave beside its configuration, adapter and numbers.
_BESIDE = (summary.SUMMARY, REPORT, trackers.TENSORBOARD, trackers.WANDB_ID)
PREVIOUS = "previous"  # where in its folder a finished run goes when another takes its place


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves: its folder, the scores before and after, and the losses of the steps."""

    folder: Path
    before: Score
    after: Score
    losses: tuple[float, ...]


def train(path: Path, overrides: Sequence[str] = (), display: Display | None = None) -> Result:
    """Runs the configuration in `path` with `section.key=value` overrides.

    Raises JpeftError for everything a user can mend; mistakes in the configuration and the data are found before the
    model is loaded.
    """
    display = display or Display()
    started = time.monotonic()
    config = session.located(configs.load(path, overrides))
    session.check_sources(config)
    trackers.check(config.output)
    folder = Path(config.output.folder)
    _check_place(folder)
    data, train_rows, test_rows = task_data.read(config.data, config.model.task)
    config = config.model_copy(update={"data": data})
    _check_folder(folder, config)
    session.keep_compiled()

    counted = f"{len(train_rows):,} rows to train on, {len(test_rows):,} held out"
    display.say(f"data      {counted}, from {config.data.source}")
    tokenizer = session.tokenizer(config)
    model = session.base_model(config)
    model = configs.method_of(config)(model, rngs=jax.random.key(config.training.seed))
    plan = jpeft.describe(model)
    display.say(f"model     {config.model.source}, {plan.total - plan.trainable:,} frozen parameters")
    display.say(
        f"method    {_methods(config)}: {plan.trainable:,} trainable parameters "
        f"({100 * plan.trainable / plan.total:.2f}%, {size(plan.trainable_bytes)})"
    )
    limit = min(config.data.max_length, session.context(model) or config.data.max_length)
    types = session.takes_types(model)
    task = task_data.prepare(task_of(data, config.model.task), train_rows, test_rows, tokenizer, limit, types=types)
    for name, counts in task.counts.items():
        for what, count in counts.items():
            display.say(f"warning   {name}: {count} {what}")
    loop = Loop(config, model, task, Reader(tokenizer, limit, types=types), folder, display, started)
    _open_folder(folder, config)
    return loop.run()


class Loop:
    """One run in memory: the parts of the model, the plan of rows, and what is reported."""

    def __init__(
        self,
        config: Config,
        model: Any,
        task: TaskData,
        reader: Reader,
        folder: Path,
        display: Display,
        started: float,
    ):
        self.config, self.task, self.folder, self.display = config, task, folder, display
        self.started = started
        training = config.training
        labels = jpeft.param_labels(model)
        self.graphdef, self.adapter, self.buffers, self.frozen = jpeft.partition(model)
        self.lengths = [len(example) for example in task.train]
        self.buckets = batches.edges([*self.lengths, *map(len, task.test)])
        self.per_step = training.batch_size * training.accumulation
        self.per_epoch = math.ceil(len(task.train) / self.per_step)
        self.steps = min(training.max_steps or training.epochs * self.per_epoch, training.epochs * self.per_epoch)
        groups = {key: labels[key] for key in self.adapter}
        plain = optimizer(training, self.steps, groups)
        self.rates = rates(training, self.steps, groups)
        self.transform = jpeft.optimizer(model, plain, total_steps=self.steps)
        self.plan = jpeft.describe(model)
        self.seconds = dict.fromkeys(("setup", "compile", "train", "evaluation", "between_steps", "input"), 0.0)
        self.feed = batches.Batches(task.kind, task.train, training.seed)
        self.evaluator = Evaluator(
            (self.graphdef, self.buffers, self.frozen),
            task,
            reader,
            config.evaluation,
            self.buckets,
            config.evaluation.batch_size or 4 * training.batch_size,
        )

    def run(self) -> Result:
        """Trains, scores, saves, reports."""
        epochs = math.ceil(self.steps / self.per_epoch)
        plans = [self._plan(epoch) for epoch in range(epochs)]
        shapes = {window.length for plan in plans for window in plan}
        self.display.say(
            f"steps     {self.steps} of {self.per_step} rows, padded to {', '.join(map(str, sorted(shapes)))} tokens: "
            f"{len(shapes)} programs to compile for training, {self.evaluator.shapes} for evaluation"
        )
        self.seconds["setup"] = time.monotonic() - self.started
        facts = self._facts(sorted(shapes))
        summary.write(self.folder, {"status": "running", **facts})
        with trackers.open_trackers(self.config, self.folder) as log:
            before = self._evaluate(0, log, "before", answers=True)
            losses = self._train([window for plan in plans for window in plan][: self.steps], log)
            after = self._evaluate(self.steps, log, "after", answers=True)
        self._check_result(after)
        model = jpeft.combine(self.graphdef, self.adapter, self.buffers, self.frozen)
        jpeft.save_adapter(self.folder / session.ADAPTER, model)
        self._report(before, after, facts)
        return Result(self.folder, before, after, losses)

    def _plan(self, epoch: int) -> list[batches.Window]:
        return batches.plan(self.lengths, self.buckets, self.per_step, self.config.training.seed, epoch)

    def _train(self, windows: Sequence[batches.Window], log: Trackers) -> tuple[float, ...]:
        training = self.config.training
        step = make_step(self.graphdef, self.task.kind, self.transform)
        state = self.transform.init(self.adapter)
        key = jax.random.fold_in(jax.random.key(training.seed), 1)
        every = self.config.evaluation.every or self.per_epoch
        losses: list[float] = []
        busy, tokens = 0.0, 0
        seen: set[int] = set()
        got: float | None = None  # when the last step's result came, if nothing but steps was done since
        with self.display.progress(self.steps) as meter:
            for number, window in enumerate(windows):
                begun = time.monotonic()
                batch = self.feed(window, self.per_step)
                fed = time.monotonic()
                count = int(sum(self.lengths[row] for row in window.rows))
                self.adapter, state, found = step(
                    self.adapter,
                    state,
                    self.buffers,
                    self.frozen,
                    batches.split(batch, training.accumulation),
                    key,
                    jnp.int32(number),
                )
                metrics = {name: float(value) for name, value in jax.device_get(found).items()}
                self._count(fed - (got or begun), fed - begun, time.monotonic() - fed, new=window.length not in seen)
                seen.add(window.length)
                got = time.monotonic()
                self._check_finite(metrics, number, window)
                busy, tokens = busy + time.monotonic() - begun, tokens + count
                losses.append(metrics["loss"])
                self._log_step(log, meter, number + 1, metrics, busy, tokens)
                if (number + 1) % every == 0 and number + 1 < self.steps:
                    self._evaluate(number + 1, log, f"step {number + 1}", answers=False)
                    got = None
        return tuple(losses)

    def _count(self, between: float, waited: float, step: float, *, new: bool) -> None:
        """Adds up seconds: between two steps, of that for input, of a step, which compiles if its shape is new."""
        self.seconds["between_steps"] += between
        self.seconds["input"] += waited
        self.seconds["compile" if new else "train"] += step

    def _log_step(
        self, log: Trackers, meter: Meter, step: int, metrics: dict[str, float], busy: float, tokens: int
    ) -> None:
        rate = tokens / max(busy, 1e-9)
        learning = {"learning_rate": {group: float(values[step - 1]) for group, values in self.rates.items()}}
        speed = {"tokens": tokens, "tokens_per_second": round(rate, 1), "seconds": round(busy, 3)}
        log.record({"step": step, **metrics, **learning, **speed})
        meter.update(step, metrics["loss"], rate, busy / step * (self.steps - step))

    def _check_finite(self, metrics: dict[str, float], number: int, window: batches.Window) -> None:
        if all(math.isfinite(value) for value in metrics.values()):
            return
        rows = [self.task.train_rows.place(self.task.train[row].row) for row in window.rows[:5]]
        raise JpeftError(
            f"step {number + 1}: the loss or its gradient is not a number any more (loss {metrics['loss']}, gradient "
            f"norm {metrics['gradient_norm']}); the step's rows begin with {'; '.join(rows)}. A smaller "
            f"training.learning_rate (now {self.config.training.learning_rate:g}) usually helps"
        )

    def _check_result(self, after: Score) -> None:
        broken = [name for name, array in self.adapter.items() if not bool(jnp.all(jnp.isfinite(array)))]
        broken += [name for name, value in after.metrics.items() if not math.isfinite(value)]
        if broken:
            raise JpeftError(
                f"after step {self.steps}, {', '.join(broken[:4])} is not finite any more, so nothing was saved. A "
                f"smaller training.learning_rate (now {self.config.training.learning_rate:g}) usually helps"
            )

    def _evaluate(self, step: int, log: Trackers, name: str, *, answers: bool) -> Score:
        begun = time.monotonic()
        score = self.evaluator(self.adapter, answers=answers)
        log.record({"step": step, "evaluation": score.metrics})
        self.seconds["evaluation"] += time.monotonic() - begun
        self.display.say(f"{name:<9} {score} ({len(self.task.test)} held-out rows, {clock(time.monotonic() - begun)})")
        return score

    def _facts(self, shapes: list[int]) -> dict[str, Any]:
        """What is known of the run before its first step."""
        plan = self.plan
        return {
            "method": _methods(self.config),
            "rows": {"to train on": len(self.task.train_rows), "held out": len(self.task.test_rows)},
            "steps": self.steps,
            "shapes": shapes,
            "parameters": {
                "trainable": plan.trainable,
                "trainable_bytes": plan.trainable_bytes,
                "frozen": plan.total - plan.trainable,
                "frozen_bytes": plan.total_bytes - plan.trainable_bytes,
            },
            **summary.machine(),
        }

    def _report(self, before: Score, after: Score, facts: dict[str, Any]) -> None:
        rows = self._samples(before, after)
        shown = self.config.evaluation.samples
        self._table(held_out.pick(rows, shown))
        metric = next(iter(after.metrics))
        self.display.say(
            f"result    {metric} {before.metrics[metric]:.3f} before, {after.metrics[metric]:.3f} after "
            f"({clock(time.monotonic() - self.started)} in all)"
        )
        usage = self._usage()
        result = {
            "ended": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "before": before.metrics,
            "after": after.metrics,
            "courses": held_out.counts(rows) if rows and shown else {},
            "samples": [held_out.entry(row) for row in held_out.pick(rows, 4 * shown)],
            "seconds": {**self.seconds, "total": time.monotonic() - self.started},
            "memory": summary.memory(),
            "usage": usage,
        }
        try:
            summary.write(self.folder, {"status": "finished", **facts, **result})
            self.display.say(f"report    {write_report(self.folder)}")
        except JpeftError as error:  # the adapter is safe, and a report can be made again
            self.display.say(f"warning   {REPORT} was not written: {error}")
        self.display.say(f"\n{usage}")

    def _samples(self, before: Score, after: Score) -> list[Sample]:
        """Every held-out row with its answers before and after, if there were any."""
        if not (before.answers and after.answers):
            return []
        task = self.task
        wanted = task.shown(task.right)
        return held_out.collect(task.asked, wanted, before.answers, after.answers, task.kind.agree)

    def _table(self, rows: Sequence[Sample]) -> None:
        if rows:
            columns = [self.task.kind.asked_as, "wanted", "before", "after"]
            texts = [(row.asked, row.wanted, row.before, row.after) for row in rows]
            self.display.table("Held-out rows, before and after", columns, [list(map(shortened, row)) for row in texts])

    def _usage(self) -> str:
        """Where the adapter is, and what to type to use it."""
        where, command = shlex.quote(str(self.folder)), _command()
        return (
            f"The adapter is in {self.folder / session.ADAPTER}, every step in {self.folder / session.METRICS}.\n"
            f"{self._try_it(command, where)}"
            f"  merge it   {command} merge {where} {shlex.quote(str(self.folder) + '-merged')}\n"
            f"  in Python  base = {session.load_call(self.config)}\n"
            f"             model = jpeft.load_adapter({str(self.folder / session.ADAPTER)!r}, base)"
        )

    def _try_it(self, command: str, where: str) -> str:
        """The line that asks the run something, if one prompt is all it needs."""
        example, whole = self.task.kind.example_prompt(self.task.test_rows.dataset[0]) or ("", False)
        if not example.strip():
            return ""
        return f"  try it     {command} generate {where}{' --raw' * whole} --prompt {shlex.quote(example)}\n"


def _command() -> str:
    """How this program was called, so that what is printed can be pasted."""
    called = Path(sys.argv[0])
    return shlex.quote(sys.argv[0]) if called.name == "jpeft" else f"{shlex.quote(sys.executable)} -m train"


def _methods(config: Config) -> str:
    entries = config.method if isinstance(config.method, list) else [config.method]
    return " + ".join(
        f"{entry['name']} ({', '.join(f'{k} {v}' for k, v in entry.items() if k != 'name')})" for entry in entries
    )


def _check_place(folder: Path) -> None:
    """Refuses an output folder that could never be written, before anything is loaded."""
    try:
        if folder.exists() and not folder.is_dir():
            raise JpeftError(f"output.folder: {folder} is a file")
        above = next(place for place in (folder, *folder.parents) if place.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise JpeftError(f"output.folder: {folder} cannot be written: {above} is no folder or read-only")
    except OSError as error:
        raise JpeftError(f"output.folder: {folder} cannot be used: {error.strerror or error}") from None


def _check_folder(folder: Path, config: Config) -> None:
    """Refuses a folder that holds a finished run of another configuration, or something that is no run."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not ((folder / session.CONFIG).is_file() and (folder / session.METRICS).is_file()):
        raise JpeftError(f"output.folder: {folder} holds other files and no run; give an empty or new folder")
    if config.output.overwrite or not (folder / session.ADAPTER).exists():
        return  # an unfinished run has nothing to lose
    changed = configs.difference(configs.load(folder / session.CONFIG), config)
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise JpeftError(
            f"output.folder: {folder} holds a run of another configuration:\n{listed}\n"
            f"give another folder, or output.overwrite=true to move it to {folder / PREVIOUS}"
        )


def _open_folder(folder: Path, config: Config) -> None:
    """Makes the folder of the run. A finished run that stands there moves aside whole, so its parts are never mixed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / session.ADAPTER).exists():
            previous = folder / PREVIOUS
            shutil.rmtree(previous, ignore_errors=True)
            previous.mkdir()
            for name in (session.ADAPTER, session.METRICS, session.CONFIG, *_BESIDE):
                if (folder / name).exists():
                    (folder / name).rename(previous / name)
        configs.save(config, folder / session.CONFIG)
    except OSError as error:
        raise JpeftError(f"output.folder: {folder} cannot be written: {error.strerror or error}") from None
