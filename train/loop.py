"""The loop of a run: steps, evaluations, checkpoints, and going on where a killed process stopped.

While the device computes a step the host prepares the next: its batch is made in a thread, and it is dispatched before
the numbers of the step before are fetched. A checkpoint after step N is written when everything that N brings
(numbers, evaluation) is recorded, so a run that goes on from it repeats nothing and misses nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jpeft
from jpeft.errors import JpeftError
from train import placing, processes, trackers
from train.ahead import Ahead
from train.batches import Window
from train.checkpoints import Checkpoints, State
from train.data import TaskData
from train.display import Display, Meter, clock
from train.evaluate import Evaluator, Score
from train.examples import Reader
from train.folder import AFTER, BEFORE, RunFolder, write_whole
from train.health import Health
from train.metrics import LOWER_IS_BETTER
from train.plan import Plan
from train.schema import Config
from train.step import make_step
from train.stopping import Stopped, Stopping
from train.streams import StreamedWindow
from train.trackers import Trackers

# Metrics that are known without what the model writes.
_CHEAP = frozenset({"loss", "perplexity"})


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was dispatched: its number from 1, its rows, and its numbers and votes, which are still to come."""

    number: int
    window: Window
    found: dict[str, jax.Array]
    votes: jax.Array | None = None


class Loop:
    """One run in memory. `run` takes it to its end from wherever its folder stands."""

    def __init__(
        self,
        config: Config,
        model: Any,
        task: TaskData,
        reader: Reader,
        folder: RunFolder,
        display: Display,
        mesh: Mesh | None = None,
    ):
        self.config, self.task, self.folder, self.display, self.mesh = config, task, folder, display, mesh
        evaluation = config.evaluation
        self.plan = Plan(config, model, task)
        self.graphdef, adapter, self.buffers, self.frozen = jpeft.partition(model)
        # The step donates its arrays, and those of `model` are its owner's.
        adapter = jax.tree.map(jnp.copy, adapter)
        best = jax.tree.map(jnp.copy, adapter) if evaluation.best else {}
        self.layouts = placing.layouts(self.plan.transform, adapter, mesh, on_host=self.plan.on_host)
        init = jax.jit(self.plan.transform.init, out_shardings=None if self.layouts is None else self.layouts[1])
        self.state = State(adapter, init(adapter), best, {"seconds": {}, "resumed": []})
        self.seconds = dict.fromkeys(("compile", "train", "evaluation", "between_steps", "input"), 0.0)
        self.evaluator = Evaluator(
            (self.graphdef, self.buffers, self.frozen),
            task,
            reader,
            evaluation,
            self.plan.buckets,
            evaluation.batch_size or 4 * config.training.batch_size,
            mesh,
        )
        self.votes = processes.Votes(mesh)
        self.done = 0

    @property
    def model(self) -> Any:
        """The model with the adapter as it is now."""
        return jpeft.combine(self.graphdef, self.state.adapter, self.buffers, self.frozen)

    def run(self) -> tuple[Score, Score]:
        """Trains to the end; returns the scores before and after. The adapter is then `model`'s.

        Raises Stopped after SIGTERM or Ctrl-C, with a checkpoint on disk, and JpeftError if the loss is not a number,
        diverges, or a checkpoint cannot be written; the message names the checkpoint that stays.
        """
        settings = self.config.checkpoints
        with (
            Stopping(raising=jax.process_count() == 1) as stopping,
            Checkpoints(
                self.folder.checkpoints,
                keep=settings.keep,
                every=settings.every or self.plan.every,
                minutes=settings.minutes,
                say=self.display.say,
            ) as saved,
        ):
            self.evaluator.between = functools.partial(self._vote, stopping)
            found = saved.restore(self.state)
            if found is not None:
                self.done, self.state = found
                self.seconds |= self.state.notes["seconds"]
                self.state.notes["resumed"].append(self.done)
                self.display.say(
                    f"resumed   after step {self.done} of {self.plan.steps}, from {self.folder.checkpoints}"
                )
            with self._trackers() as log:
                try:
                    before = self._before(log)
                    self._train(log, saved, stopping)
                    after = self._after(log)
                except Stopped as stop:
                    self._stopped(stop, saved)
                    raise
        self._write(AFTER, after)
        return before, after

    def _trackers(self) -> Trackers:
        """Those of the run; of several processes the first has them."""
        if not processes.first():
            return Trackers()
        return trackers.open_trackers(self.config, self.folder.path, after=self.done)

    def _write(self, name: str, score: Score) -> None:
        if processes.first():
            write_whole(self.folder.path / name, json.dumps(dataclasses.asdict(score)) + "\n")

    def _vote(self, stopping: Stopping) -> None:
        """Between the batches of an evaluation: raises Stopped if any process was asked to stop."""
        self.votes.count(self.votes.cast(stopping.asked))
        self._obey()

    def _obey(self) -> None:
        if self.votes.stop:
            raise Stopped(self.votes.stop)

    def _before(self, log: Trackers) -> Score:
        path, best = self.folder.path / BEFORE, self.config.evaluation.best
        known = processes.from_first(lambda: path.read_text(encoding="utf-8") if path.is_file() and self.done else "")
        if known:
            score = Score(**json.loads(known))
        else:
            score = self._evaluate(0, log, "before", answers=True)
            self._write(BEFORE, score)
        if best is not None and best not in score.metrics:
            raise JpeftError(f"evaluation.best: no metric {best!r}; there are {', '.join(score.metrics)}")
        return score

    def _train(self, log: Trackers, saved: Checkpoints, stopping: Stopping) -> None:
        kept = processes.from_first(lambda: trackers.read(self.folder.path / trackers.METRICS)[0])
        clockwork = Clockwork(self, log, Health(self.config.training.divergence), kept)
        scored = {entry["step"] for entry in kept if "evaluation" in entry}
        if self.done and self.done not in scored:  # the run was stopped while it evaluated
            self._evaluate_if_due(log)
        step = make_step(self.graphdef, self.task.kind, self.plan.recipe, self.layouts)
        key = jax.random.fold_in(jax.random.key(self.config.training.seed), 1)
        coming = Ahead(self._batch, self.plan.windows_from(self.done, self.state.notes.get("at", (0, 0, 0))))
        with self.display.progress(self.plan.steps) as meter:
            clockwork.meter = meter
            try:
                for window, batch in self._fed(coming, clockwork, saved):
                    with stopping.held():
                        at = jnp.int32(self.done), self.plan.rates_at(self.done)
                        arguments = (self.buffers, self.frozen, batch, key, *at)
                        clockwork.dispatching(window, coming.waited)
                        adapter, optimizer_state, found = step(self.state.adapter, self.state.optimizer, *arguments)
                        self.state = dataclasses.replace(self.state, adapter=adapter, optimizer=optimizer_state)
                        self.done += 1
                        if isinstance(window, StreamedWindow):
                            self.state.notes["at"] = window.behind
                        votes = self.votes.cast(stopping.asked, saved.overdue)
                        clockwork.dispatched(Step(self.done, window, found, votes))
                        pause = self.done % self.plan.every == 0 or saved.due(self.done) or self.done == self.plan.steps
                        self._checked(clockwork, saved, 0 if pause else 1)
                    self._obey()
                    if pause:
                        self._pause(log, saved, stopping)
                        clockwork.paused()
            except Stopped:
                self._checked(clockwork, saved, 0)
                raise
        if self.task.stream is not None:
            for what, count in self.task.stream.counts.items():
                self.display.say(f"warning   training, behind the first rows: {count} {what}")

    def _fed(
        self, coming: Ahead[Window, dict[str, jax.Array]], clockwork: Clockwork, saved: Checkpoints
    ) -> Iterator[tuple[Window, dict[str, jax.Array]]]:
        """What is coming. A fault in rows that were read only now is raised when the steps before are saved."""
        try:
            yield from coming
        except JpeftError as error:
            self._checked(clockwork, saved, 0)
            if not self.done or jax.process_count() > 1:  # which others may not have met, and saving takes all
                raise
            self._save(saved)
            raise JpeftError(
                f"{error}. The checkpoint of step {self.done} is saved: mend the rows, and the same command goes on "
                "from there"
            ) from None

    def _pause(self, log: Trackers, saved: Checkpoints, stopping: Stopping) -> None:
        """What happens between two steps now and then."""
        self._evaluate_if_due(log)
        if saved.due(self.done) or self.done == self.plan.steps:
            with stopping.held():
                self._save(saved)

    def _batch(self, window: Window) -> dict[str, jax.Array]:
        rows = self.config.training.batch_size
        own = placing.own_rows(self.mesh, rows)
        return placing.put(self.plan.batch(window, own), self.mesh, axis=1, rows=rows)

    def _checked(self, clockwork: Clockwork, saved: Checkpoints, flying: int) -> None:
        """Records the steps but for the latest `flying`; a fault among them ends the run."""
        fault = clockwork.collect(flying)
        saved.late = saved.late or self.votes.late
        self.votes.late = False
        if fault is None:
            return
        number, window, words = fault
        saved.wait()
        rows = itertools.islice(self.plan.places(window), 5)
        kept = (
            f"the checkpoint of step {saved.latest} stays" if saved.latest is not None else "there is no checkpoint yet"
        )
        raise JpeftError(
            f"step {number}: {words}; the step's rows begin with {'; '.join(rows)}; {kept}. A smaller "
            f"training.learning_rate (now {self.config.training.learning_rate:g}) usually helps"
        )

    def _save(self, saved: Checkpoints) -> None:
        self.state.notes["seconds"] = dict(self.seconds)
        try:
            saved.save(self.done, self.state)
        except JpeftError as error:
            if "not finite" not in str(error):
                raise
            kept = f"the checkpoint of step {saved.latest} stays" if saved.latest is not None else "nothing was saved"
            raise JpeftError(
                f"{error}; {kept}. A smaller training.learning_rate (now {self.config.training.learning_rate:g}) "
                "usually helps"
            ) from None

    def _stopped(self, stop: Stopped, saved: Checkpoints) -> None:
        if not self.done:
            self.display.say(f"stopped   by {stop} before the first step; nothing is lost, nothing was saved")
            return
        self._save(saved)
        saved.wait()
        self.display.say(
            f"stopped   by {stop} after step {self.done} of {self.plan.steps}, which is saved; the same command goes "
            "on from there"
        )

    def _evaluate_if_due(self, log: Trackers) -> None:
        """An evaluation in the middle; with `evaluation.best`, one that may be the best so far."""
        best = self.config.evaluation.best
        last = self.done == self.plan.steps
        if self.done % self.plan.every and not (last and best):
            return
        if last and best is None:
            return  # the score after training says it
        score = self._evaluate(self.done, log, f"step {self.done}", answers=best is not None and best not in _CHEAP)
        if best is None:
            return
        value = -score.metrics[best] if best in LOWER_IS_BETTER else score.metrics[best]
        if value > self.state.notes.get("best_value", -math.inf):
            notes = {**self.state.notes, "best_value": value, "best_step": self.done}
            self.state = dataclasses.replace(self.state, best=jax.tree.map(jnp.copy, self.state.adapter), notes=notes)

    def _after(self, log: Trackers) -> Score:
        name, step = "after", self.state.notes.get("best_step")
        if step is not None:
            self.state = dataclasses.replace(self.state, adapter=self.state.best)
            self.display.say(f"best      step {step} has the best {self.config.evaluation.best}; its adapter is kept")
        score = self._evaluate(self.plan.steps, log, name, answers=True)
        broken = [name for name, value in score.metrics.items() if not math.isfinite(value)]
        if broken:
            raise JpeftError(
                f"after step {self.plan.steps}, {', '.join(broken[:4])} is not finite any more, so the adapter was not "
                f"written. A smaller training.learning_rate (now {self.config.training.learning_rate:g}) usually helps"
            )
        return score

    def _evaluate(self, step: int, log: Trackers, name: str, *, answers: bool) -> Score:
        begun = time.monotonic()
        score = self.evaluator(self.state.adapter, answers=answers)
        log.record({"step": step, "evaluation": score.metrics})
        self.seconds["evaluation"] += time.monotonic() - begun
        self.display.say(f"{name:<9} {score} ({len(self.task.test)} held-out rows, {clock(time.monotonic() - begun)})")
        return score


class Clockwork:
    """What is known of the steps: their numbers as they come in, their health, and where the time goes.

    The time between steps is counted from above: a device that had its next step before it ended the last was not
    kept waiting, and where it may have been, all the host's time since it last was seen busy counts.
    """

    def __init__(self, loop: Loop, log: Trackers, health: Health, kept: list[dict[str, Any]]):
        self._loop, self._log, self._health = loop, log, health
        self.meter: Meter | None = None
        self._flying: deque[Step] = deque()
        self._seen: set[int] = set()
        self._got: float | None = None  # when the device was last seen busy or done, if only steps were done since
        self._began = time.monotonic()
        self._waited = 0.0
        self._new = False
        last: dict[str, Any] = {"seconds": 0.0, "tokens": 0}
        for entry in kept:
            if "loss" in entry:
                last = entry
                health.fault({name: entry[name] for name in ("loss", "gradient_norm")})
        self._busy, self._tokens = float(last["seconds"]), int(last["tokens"])
        self._since = time.monotonic()

    def dispatching(self, window: Window, waited: float) -> None:
        """A step is about to be given to the device."""
        now, seconds = time.monotonic(), self._loop.seconds
        idle = not self._flying or _ready(self._flying[-1])
        if idle and self._got is not None:
            seconds["between_steps"] += now - self._got
            seconds["input"] += waited - self._waited
        self._waited = waited
        self._new = window.length not in self._seen
        self._seen.add(window.length)
        self._began = now

    def dispatched(self, step: Step) -> None:
        """It was."""
        self._flying.append(step)
        if self._new:
            self._loop.seconds["compile"] += time.monotonic() - self._began

    def collect(self, flying: int) -> tuple[int, Window, str] | None:
        """Records all steps but the latest `flying`. Returns the first with a fault: its number, rows, and words."""
        fault = None
        while len(self._flying) > flying and fault is None:
            step = self._flying.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(step.found).items()}
            self._loop.votes.count(step.votes)
            words = self._health.fault(metrics)
            fault = (step.number, step.window, words) if words else None
            if fault is None:
                self._record(step, metrics)
        now = time.monotonic()
        if not self._new:
            self._loop.seconds["train"] += now - (self._got or self._began)
        self._got = now
        return fault

    def paused(self) -> None:
        """Something else than a step was done."""
        self._got, self._since = None, time.monotonic()

    def _record(self, step: Step, metrics: dict[str, float]) -> None:
        loop, now = self._loop, time.monotonic()
        self._busy, self._since = self._busy + now - self._since, now
        self._tokens += sum(len(example) for example in loop.plan.examples(step.window))
        rate = self._tokens / max(self._busy, 1e-9)
        learning = {
            "learning_rate": {group: float(rate) for group, rate in loop.plan.rates_at(step.number - 1).items()}
        }
        speed = {"tokens": self._tokens, "tokens_per_second": round(rate, 1), "seconds": round(self._busy, 3)}
        self._log.record({"step": step.number, **metrics, **learning, **speed})
        if self.meter is not None:
            left = self._busy / step.number * (loop.plan.steps - step.number)
            self.meter.update(step.number, metrics["loss"], rate, left)


def _ready(step: Step) -> bool:
    loss: Any = step.found["loss"]
    return bool(loss.is_ready())
