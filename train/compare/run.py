"""A comparison from its file to its table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jpeft.errors import JpeftError
from train import session, summary
from train.compare import table, trials
from train.compare.config import Comparison, load
from train.compare.measure import Costs, measured
from train.compare.page import page
from train.compare.table import Entry
from train.compare.trials import Trial
from train.display import Display
from train.ending import methods_of
from train.folder import write_whole, writing
from train.materials import Materials
from train.run import checked

TABLE, CSV, PAGE = "table.md", "table.csv", "compare.html"


def compare(path: Path, overrides: Sequence[str] = (), display: Display | None = None) -> list[Entry]:
    """Runs the comparison in `path`, or goes on with it, and writes its table; returns the table's lines, best first.

    Raises JpeftError for what is wrong with the file, its data or its model before anything is trained; a method that
    fails is a line that says so. Raises `train.stopping.Stopped` after SIGTERM or Ctrl-C.
    """
    display, begun = display or Display(), time.monotonic()
    comparison = load(path, overrides)
    base = checked(comparison.base)
    comparison = Comparison(base, comparison.methods, comparison.grid, comparison.forgetting)
    session.keep_compiled()
    materials = Materials(base)
    trials.check(comparison, materials)
    display.say(f"compare   {len(comparison.methods)} methods on {base.model.source}, {base.data.source}")
    materials.base.tokenizer()
    materials.base.model(comparison.grid.seeds[0])

    tried = trials.searched(comparison, materials, display)
    rates = trials.chosen(comparison, tried)
    ran = trials.final(comparison, rates, materials, display)
    entries = table.ordered([_entry(comparison, label, rates, tried, ran, materials) for label in comparison.methods])
    notes = _notes(comparison, materials, rates, ran)
    if overrides:
        notes.append(f"Set on the command line: {' '.join(overrides)}.")
    _write(comparison, entries, tried, notes, path)
    display.table(path.stem, table.columns(entries), [table.cells(entry, entries) for entry in entries])
    for label, message in table.failures(entries):
        display.say(f"failed    {label}: {message}")
    display.say(f"written   {', '.join(str(comparison.folder / name) for name in (TABLE, CSV, PAGE))}")
    display.say(f"took      {(time.monotonic() - begun) / 60:.1f} minutes, without what was finished before")
    return entries


def _entry(
    comparison: Comparison,
    label: str,
    rates: Mapping[str, float],
    tried: Sequence[Trial],
    ran: Sequence[Trial],
    materials: Materials,
) -> Entry:
    mine = [trial for trial in ran if trial.label == label]
    config = comparison.base.model_copy(update={"method": comparison.methods[label]})
    broken = [trial for trial in mine or tried if trial.label == label and trial.message]
    costs: Costs | None = None
    message = f"{broken[0].message} (rate {broken[0].rate:g}, seed {broken[0].seed})" if broken else None
    if message is None:
        try:
            costs = measured(comparison, mine, materials)
        except Exception as error:  # a method that cannot be saved, loaded or called has failed as well
            message = f"its costs could not be measured: {trials.failure(error)}"
    return Entry(label, methods_of(config), rates.get(label), mine, costs, message)


def _notes(comparison: Comparison, materials: Materials, rates: Mapping[str, float], ran: Sequence[Trial]) -> list[str]:
    """How it was made, in sentences that hold for this comparison."""
    grid, machine = comparison.grid, summary.machine()
    seeds = ", ".join(map(str, grid.seeds))
    notes = [
        f"Scores are of {len(materials.test_rows):,} held-out rows after training on {len(materials.train_rows):,}: "
        f"the mean of seeds {seeds}, ± their standard deviation."
    ]
    before = list(trials.untrained(list(ran)))
    if before:
        notes[0] += f" Before training it is {sum(before) / len(before):.4g} on average."
    if len(grid.learning_rates) > 1:
        notes.append(
            f"The learning rate of each method is the one of {', '.join(f'{rate:g}' for rate in grid.learning_rates)} "
            f"that is best on validation rows, which are a part of the training rows (validation_size "
            f"{grid.validation_size:g}), with seed {grid.seeds[0]}; the held-out rows had no say in it."
        )
        ends = min(grid.learning_rates), max(grid.learning_rates)
        for end, name in zip(ends, ("lowest", "highest"), strict=True):
            there = [label for label, rate in rates.items() if rate == end]
            if there:
                notes[-1] += f" The {name} rate was best for {', '.join(there)}, so one beyond it may be better still."
    else:
        notes.append(f"Every method has the learning rate {grid.learning_rates[0]:g}; none was searched for.")
    notes.append(
        "Step and inference are medians of a batch of the longest rows; step memory is what the compiler allots for "
        "temporaries of a step. Inference is with the method merged into the weights where it can be, and × base "  # noqa: RUF001
        "compares with the model alone, called in turns. Times contain whatever else the machine did."
    )
    devices = machine["devices"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    notes.append(f"{devices['count']} device of kind {devices['kind']}; {versions}; {time.strftime('%Y-%m-%d')}.")
    return notes


def _write(
    comparison: Comparison, entries: Sequence[Entry], tried: Sequence[Trial], notes: Sequence[str], path: Path
) -> None:
    folder = comparison.folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise JpeftError(f"{path}: cannot be read any more: {error.strerror or error}") from None
    write_whole(folder / TABLE, table.markdown(entries, tried, notes))
    write_whole(folder / CSV, table.separated(entries))
    write_whole(folder / PAGE, page(path.stem, entries, tried, notes, text))
