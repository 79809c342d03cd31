"""compare.html: the table, the plots of score against cost, and how the comparison was made, on one page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from train.compare.measure import Costs
from train.compare.pareto import Point, plot
from train.compare.table import Entry, cells, columns, failures, rates
from train.compare.trials import Trial
from train.metrics import LOWER_IS_BETTER
from train.report import environment

_AGAINST: dict[str, tuple[str, Callable[[Costs], float | None]]] = {
    "trained parameters": ("parameters that train", lambda costs: costs.trainable),
    "memory of a step": ("MiB of temporaries of a training step", lambda costs: (costs.step_bytes or 0) / 2**20),
    "time of a step": ("milliseconds of a training step", lambda costs: 1000 * costs.step_seconds),
    "time of inference": ("time of inference, the base's being 1", lambda costs: costs.call_ratio),
}


def page(name: str, entries: Sequence[Entry], tried: Sequence[Trial], notes: Sequence[str], config: str) -> str:
    """The page of a comparison. notes: sentences on how it was made. config: its file's text."""
    lines = [(cells(entry, entries), entry.method) for entry in entries]
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            name=name,
            columns=columns(entries),
            lines=lines,
            failures=failures(entries),
            plots=plots(entries),
            rates=rates(tried) if tried else None,
            notes=notes,
            config=config,
        )
    )


def plots(entries: Sequence[Entry]) -> list[tuple[str, Markup]]:
    """(heading, drawing) of score against each cost that is known."""
    shown = [entry for entry in entries if entry.scores and entry.costs is not None]
    if not shown:
        return []
    metric, made = shown[0].trials[0].metric, []
    for name, (below, cost) in _AGAINST.items():
        points = []
        for entry in shown:
            assert entry.costs is not None
            spread = entry.spread if math.isfinite(entry.spread) else 0.0
            points.append(Point(entry.label, cost(entry.costs) or 0.0, entry.mean, spread))
        title = f"{metric.replace('_', ' ')} against {name}"
        drawing = plot(title, below, points, lower_is_better=metric in LOWER_IS_BETTER)
        if drawing:
            made.append((title[:1].upper() + title[1:], drawing))
    return made
