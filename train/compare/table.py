"""The table of a comparison: one line a method, for Markdown, csv and the terminal."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Sequence

from train.compare.measure import Costs
from train.compare.trials import Trial
from train.curves import number
from train.display import size

UNKNOWN = "–"  # noqa: RUF001


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method: its settings in words, the runs that count, its costs, and why it failed if it did.

    rate: the one that was chosen. A method with a run that failed has failed: the mean of the others would be a choice
    of seeds. unmeasured: why there are no costs of a method that has scores.
    """

    label: str
    method: str
    rate: float | None
    trials: Sequence[Trial]
    costs: Costs | None
    message: str | None = None
    unmeasured: str | None = None

    @property
    def scores(self) -> list[float]:
        """By seed."""
        return [] if self.message else [trial.after[trial.metric] for trial in self.trials]

    @property
    def mean(self) -> float:
        """The mean score; not a number if the method failed."""
        return statistics.mean(self.scores) if self.scores else math.nan

    @property
    def spread(self) -> float:
        """The standard deviation over seeds (of a sample: n - 1); not a number of one seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan

    @property
    def merit(self) -> float:
        """The mean with its sign turned where less is better."""
        return statistics.mean(trial.merit for trial in self.trials) if self.scores else -math.inf


def ordered(entries: Sequence[Entry]) -> list[Entry]:
    """Best first, what failed last."""
    return sorted(entries, key=lambda entry: -entry.merit)


def columns(entries: Sequence[Entry]) -> list[str]:
    """The headings of `cells`."""
    metric = next((entry.trials[0].metric for entry in entries if entry.scores), "score").replace("_", " ")
    made = ["method", metric, "rate", "trained", "file", "step", "step memory", "inference", "× base"]  # noqa: RUF001
    return [*made, "other text"] if _forgets(entries) else made


def _forgets(entries: Sequence[Entry]) -> bool:
    return any(entry.costs is not None and entry.costs.perplexity for entry in entries)


def cells(entry: Entry, entries: Sequence[Entry]) -> list[str]:
    """One line as it is read; other text: its perplexity before and after."""
    rate = UNKNOWN if entry.rate is None else f"{entry.rate:g}"
    score = "failed"
    if entry.scores:
        score = f"{entry.mean:.4g}" + (f" ± {entry.spread:.2g}" if len(entry.scores) > 1 else "")
    costs = entry.costs
    if costs is None:
        rest = [UNKNOWN] * (7 if _forgets(entries) else 6)
        return [entry.label, score, rate, *rest]
    made = [
        entry.label,
        score,
        rate,
        f"{costs.trainable:,}",
        size(costs.file_bytes),
        _milliseconds(costs.step_seconds),
        UNKNOWN if costs.step_bytes is None else size(costs.step_bytes),
        f"{_milliseconds(costs.call_seconds)}{' merged' * costs.merged}",
        f"{costs.call_ratio:.2f}",
    ]
    if _forgets(entries):
        made.append(" → ".join(map(number, costs.perplexity)) if costs.perplexity else UNKNOWN)
    return made


def _milliseconds(seconds: float) -> str:
    """Three digits, written out: 1,170 ms, 30.2 ms."""
    return f"{float(f'{1000 * seconds:.3g}'):,g} ms"


def failures(entries: Sequence[Entry]) -> list[str]:
    """A sentence for each method of which something failed."""
    failed = [f"{entry.label} failed: {entry.message}" for entry in entries if entry.message]
    lacking = [entry for entry in entries if entry.unmeasured]
    return failed + [f"The costs of {entry.label} could not be measured: {entry.unmeasured}" for entry in lacking]


def markdown(entries: Sequence[Entry], tried: Sequence[Trial], notes: Sequence[str]) -> str:
    """table.md: the table, what failed and why, all scores that chose a rate, and how it all was made."""
    parts = [_grid(columns(entries), [cells(entry, entries) for entry in entries])]
    parts += failures(entries)
    if tried:
        parts += ["Scores on the validation rows, by which the rates were chosen:", _grid(*rates(tried))]
    return "\n\n".join([*parts, *notes]) + "\n"


def rates(tried: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the scores that chose the rates: methods by rates."""
    grid = list(dict.fromkeys(trial.rate for trial in tried))
    found = {(trial.label, trial.rate): trial for trial in tried}
    lines = []
    for label in dict.fromkeys(trial.label for trial in tried):
        row = [found[label, rate] for rate in grid]
        lines.append([label, *("failed" if one.message else f"{one.after[one.metric]:.4g}" for one in row)])
    return ["method", *(f"{rate:g}" for rate in grid)], lines


def _grid(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(headings), ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def separated(entries: Sequence[Entry]) -> str:
    """table.csv: the same in plain numbers and SI units, each seed's score in a column of its own."""
    seeds = list(dict.fromkeys(trial.seed for entry in entries for trial in entry.trials))
    fields = [field.name for field in dataclasses.fields(Costs) if field.name != "perplexity"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    scores = [f"score_seed_{seed}" for seed in seeds]
    perplexities = ["perplexity_before", "perplexity_after"]
    writer.writerow(
        ["label", "method", "metric", "score", "spread", *scores, "learning_rate", *fields, *perplexities, "failure"]
    )
    for entry in entries:
        by_seed = {trial.seed: trial.after[trial.metric] for trial in entry.trials if trial.message is None}
        metric = entry.trials[0].metric if entry.scores else ""
        mean, spread = (value if math.isfinite(value) else "" for value in (entry.mean, entry.spread))
        costs = dataclasses.asdict(entry.costs) if entry.costs else {}
        pair = costs.get("perplexity") or ("", "")
        writer.writerow(
            [entry.label, entry.method, metric, mean, spread]
            + [by_seed.get(seed, "") for seed in seeds]
            + ["" if entry.rate is None else entry.rate]
            + [costs.get(name, "") for name in fields]
            + [*pair, entry.message or entry.unmeasured or ""]
        )
    return file.getvalue()
