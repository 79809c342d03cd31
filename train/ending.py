"""The end of a run for those who look at it: rows before and after, summary.json, report.html, what to type next."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft.describe import Description
from jpeft.errors import JpeftError
from train import samples as held_out
from train import session, summary
from train.data import TaskData
from train.display import Display, clock
from train.evaluate import Score
from train.folder import RunFolder
from train.report import REPORT, write_report
from train.samples import Sample, shortened
from train.schema import Config


@dataclasses.dataclass(frozen=True)
class Ending:
    """What a run says of itself: `begin` before its first step, `report` when its adapter is written.

    plan: of the adapted model. shapes: the lengths that batches are padded to. mergeable: whether its methods can be
    folded into the weights.
    """

    config: Config
    task: TaskData
    plan: Description
    steps: int
    shapes: Sequence[int]
    folder: RunFolder
    display: Display
    mergeable: bool

    def begin(self) -> None:
        """Writes summary.json of a run that is going on."""
        summary.write(self.folder.path, {"status": "running", **self._facts()})

    def _facts(self) -> dict[str, Any]:
        """What is known of the run before its first step."""
        plan, rows = self.plan, {"held out": len(self.task.test_rows)}
        if self.task.stream is None:
            rows = {"to train on": len(self.task.train_rows), **rows}
        return {
            "method": methods_of(self.config),
            "rows": rows,
            "steps": self.steps,
            "shapes": list(self.shapes),
            "parameters": {
                "trainable": plan.trainable,
                "trainable_bytes": plan.trainable_bytes,
                "frozen": plan.total - plan.trainable,
                "frozen_bytes": plan.total_bytes - plan.trainable_bytes,
            },
            **summary.machine(),
        }

    def report(
        self, before: Score, after: Score, seconds: Mapping[str, float], started: float, resumed: Sequence[int]
    ) -> None:
        """Prints what came of the run and writes summary.json and report.html.

        seconds: by what they were spent on. started: by the monotonic clock. resumed: steps after
        which the run went on.
        """
        rows = self._samples(before, after)
        shown = self.config.evaluation.samples
        self._table(held_out.pick(rows, shown))
        metric = next(iter(after.metrics))
        self.display.say(
            f"result    {metric} {before.metrics[metric]:.3f} before, {after.metrics[metric]:.3f} after "
            f"({clock(time.monotonic() - started)} in all)"
        )
        usage = self._usage()
        result = {
            "ended": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "before": before.metrics,
            "after": after.metrics,
            "courses": held_out.counts(rows) if rows and shown else {},
            "samples": [held_out.entry(row) for row in held_out.pick(rows, 4 * shown)],
            "seconds": {**seconds, "total": time.monotonic() - started},
            "memory": summary.memory(),
            "resumed": list(resumed),
            "usage": usage,
        }
        try:
            summary.write(self.folder.path, {"status": "finished", **self._facts(), **result})
            self.display.say(f"report    {write_report(self.folder.path)}")
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
        where, command = shlex.quote(str(self.folder.path)), _command()
        return (
            f"The adapter is in {self.folder.adapter}, every step in {self.folder.path / session.METRICS}.\n"
            f"{self._try_it(command, where)}"
            f"{self._merge_it(command, where)}"
            f"  in Python  base = {session.load_call(self.config)}\n"
            f"             model = jpeft.load_adapter({str(self.folder.adapter)!r}, base)"
        )

    def _merge_it(self, command: str, where: str) -> str:
        """The line that merges, if the methods can be merged."""
        if not self.mergeable:
            return ""
        return f"  merge it   {command} merge {where} {shlex.quote(str(self.folder.path) + '-merged')}\n"

    def _try_it(self, command: str, where: str) -> str:
        """The line that asks the run something, if one prompt is all it needs."""
        row = self.task.test_rows.dataset[0]
        example, whole = self.task.kind.example_prompt(row) or ("", False)
        pair = self.task.kind.example_pair(row)
        if not example.strip() or pair == "":
            return ""
        second = "" if pair is None else f" --text-pair {shlex.quote(pair)}"
        return f"  try it     {command} generate {where}{' --raw' * whole} --prompt {shlex.quote(example)}{second}\n"


def _command() -> str:
    """How this program was called, so that what is printed can be pasted."""
    called = Path(sys.argv[0])
    return shlex.quote(sys.argv[0]) if called.name == "jpeft" else f"{shlex.quote(sys.executable)} -m train"


def methods_of(config: Config) -> str:
    """The methods of a configuration with their settings, on one line."""
    entries = config.method if isinstance(config.method, list) else [config.method]
    made = []
    for entry in entries:
        settings = ", ".join(f"{key} {value}" for key, value in entry.items() if key != "name")
        made.append(f"{entry['name']} ({settings})" if settings else str(entry["name"]))
    return " + ".join(made)
