"""The runs of a comparison: those that choose a learning rate for each method, and those whose scores count."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

from jpeft.errors import JpeftError
from train.compare.config import Comparison
from train.display import Display, clock
from train.folder import RunFolder
from train.materials import Materials
from train.metrics import LOWER_IS_BETTER
from train.run import carry_out
from train.schema import Config
from train.stopping import Stopped


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: what it was made of and, if it came to its end, its scores; else the message of its failure."""

    label: str
    rate: float
    seed: int
    folder: Path
    before: Mapping[str, float]
    after: Mapping[str, float]
    message: str | None = None

    @property
    def metric(self) -> str:
        """The metric that methods are compared by: the first one."""
        return next(iter(self.after))

    @property
    def merit(self) -> float:
        """The score with its sign turned where less is better."""
        return -self.after[self.metric] if self.metric in LOWER_IS_BETTER else self.after[self.metric]


def check(comparison: Comparison, materials: Materials) -> None:
    """Raises JpeftError if the output folder has runs of another configuration, before anything is trained."""
    for label in comparison.methods:
        for rate in comparison.grid.learning_rates:
            for seed in comparison.grid.seeds:
                for searching in (True, False):
                    config = comparison.run(label, rate, seed, searching=searching)
                    config = config.model_copy(update={"data": materials.data})
                    changed = RunFolder(Path(config.output.folder)).changed(config)
                    if changed:
                        listed = "\n".join(f"  {line}" for line in changed)
                        raise JpeftError(
                            f"output.folder: {config.output.folder} holds a run of another configuration:\n{listed}\n"
                            f"give another output.folder, or another label than {label}; or delete runs/{label} and "
                            f"rates/{label} in {comparison.folder}, if what is there is not wanted any more"
                        )


def searched(comparison: Comparison, materials: Materials, display: Display) -> list[Trial]:
    """The runs that choose rates: each method at each rate with the first seed. None where there is one rate only.

    They learn from a part of the training rows and are scored by the rest; the held-out rows have no say in it.
    """
    grid = comparison.grid
    if len(grid.learning_rates) == 1:
        return []
    validating = materials.validating(grid.validation_size)
    display.say(
        f"rates     each method at {', '.join(f'{rate:g}' for rate in grid.learning_rates)} with seed {grid.seeds[0]}, "
        f"on {len(validating.train_rows):,} of the training rows; {len(validating.test_rows):,} of them choose"
    )
    wanted = [(label, rate) for label in comparison.methods for rate in grid.learning_rates]
    return [
        _tried(comparison.run(label, rate, grid.seeds[0], searching=True), label, validating, display)
        for label, rate in wanted
    ]


def chosen(comparison: Comparison, tried: list[Trial]) -> dict[str, float]:
    """The rate of each method that has one: best on the validation rows, of equals the one of less loss, then lower."""
    if not tried:
        return dict.fromkeys(comparison.methods, comparison.grid.learning_rates[0])
    best: dict[str, Trial] = {}
    for trial in tried:
        if trial.message is None:
            best[trial.label] = max(best.get(trial.label, trial), trial, key=_order)
    return {label: trial.rate for label, trial in best.items()}


def _order(trial: Trial) -> tuple[float, float, float]:
    return trial.merit, -trial.after["loss"], -trial.rate


def final(comparison: Comparison, rates: Mapping[str, float], materials: Materials, display: Display) -> list[Trial]:
    """The runs that count: each method at its rate with every seed, on all training rows, scored by held-out rows."""
    display.say(
        f"runs      each method at its rate with seeds {', '.join(map(str, comparison.grid.seeds))}, on all "
        f"{len(materials.train_rows):,} training rows; {len(materials.test_rows):,} held-out rows score"
    )
    # Seeds outermost: a new head is that of its seed, and so is the model that has it.
    wanted = [(label, rate, seed) for seed in comparison.grid.seeds for label, rate in rates.items()]
    return [_tried(comparison.run(label, rate, seed), label, materials, display) for label, rate, seed in wanted]


def _tried(config: Config, label: str, materials: Materials, display: Display) -> Trial:
    folder, begun = Path(config.output.folder), time.monotonic()
    rate, seed = config.training.learning_rate, config.training.seed
    before: Mapping[str, float] = {}
    after: Mapping[str, float] = {}
    message = None
    try:
        result = carry_out(config, materials, Display(Console(quiet=True)))
        assert result is not None
        before, after = result.before.metrics, result.after.metrics
    except Stopped as stop:
        display.say(f"stopped   by {stop}; the same command goes on from there")
        raise
    except Exception as error:  # whatever it is, the other methods are still worth comparing
        message = failure(error)
    said = f"failed: {message}" if message else ", ".join(f"{name} {value:.4g}" for name, value in after.items())
    display.say(f"{label:<20} rate {rate:<7g} seed {seed:<3} {said} ({clock(time.monotonic() - begun)})")
    return Trial(label, rate, seed, folder, before, after, message)


def failure(error: Exception) -> str:
    """An error on one line; what is no JpeftError with its type, which may be all that it says."""
    text = " ".join(str(error).split())
    return text if isinstance(error, JpeftError) else f"{type(error).__name__}: {text[:500]}"


def untrained(trials: list[Trial]) -> Iterator[float]:
    """The scores before training, of the metric that methods are compared by."""
    for trial in trials:
        if trial.message is None and trial.metric in trial.before:
            yield trial.before[trial.metric]
