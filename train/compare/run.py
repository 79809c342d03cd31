"""A comparison from its file to its table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jpeft.errors import JpeftError
from train import session, summary
from train.compare import table, trials
from train.compare.config import Comparison, load
from train.compare.measure import Costs, OtherText, measured
from train.compare.page import page
from train.compare.table import Entry
from train.compare.trials import Trial
from train.display import Display
from train.ending import methods_of
from train.folder import Folder, write_whole
from train.materials import Materials
from train.run import checked, made_of

TABLE, CSV, PAGE = "table.md", "table.csv", "compare.html"


def compare_all(paths: Sequence[Path], overrides: Sequence[str] = ()) -> None:
    """Runs the comparisons in `paths` one after another, all of which are read before the first begins.

    Raises JpeftError as `compare` does, and in the end if every method of one failed.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        folder = load(path, overrides).folder
        if folder in folders:
            raise JpeftError(f"{path}: output.folder {folder} is that of {folders[folder]}; each needs one of its own")
        folders[folder] = path
    results = {path: compare(path, overrides) for path in paths}
    for path, entries in results.items():
        if not any(entry.scores for entry in entries):
            raise JpeftError(f"{path}: every method failed; the first: {entries[0].message}")


def compare(path: Path, overrides: Sequence[str] = (), display: Display | None = None) -> list[Entry]:
    """Runs the comparison in `path`, or goes on with it, and writes its table; returns the table's lines, best first.

    Raises JpeftError for what is wrong with the file, its data or its model before anything is trained; a method that
    fails is a line that says so. Raises `train.stopping.Stopped` after SIGTERM or Ctrl-C.
    """
    display, begun = display or Display(), time.monotonic()
    comparison, text = load(path, overrides), path.read_text(encoding="utf-8")
    base = checked(comparison.base)
    comparison = dataclasses.replace(comparison, base=base)
    with Folder(comparison.folder).locked():
        session.keep_compiled()
        materials = Materials(base)
        other = None if comparison.forgetting is None else OtherText.read(comparison.forgetting)
        trials.check(comparison, materials)
        display.say(f"compare   {len(comparison.methods)} methods on {base.model.source}, {base.data.source}")
        earlier = _identified(comparison, materials)

        tried = trials.searched(comparison, materials, display)
        rates = trials.chosen(comparison, tried)
        ran = trials.final(comparison, rates, materials, display)
        made = [_entry(comparison, label, rates, tried, ran, materials, other) for label in comparison.methods]
        entries = table.ordered(made)
        notes = _notes(comparison, materials, rates, ran)
        if earlier:
            notes.append(f"Some of it was made before, with other versions or devices: {earlier}.")
        if overrides:
            notes.append(f"Set on the command line: {' '.join(overrides)}.")
        write_whole(comparison.folder / TABLE, table.markdown(entries, tried, notes))
        write_whole(comparison.folder / CSV, table.separated(entries))
        write_whole(comparison.folder / PAGE, page(path.stem, entries, tried, notes, text))
    display.table(path.stem, table.columns(entries), [table.cells(entry, entries) for entry in entries])
    for sentence in table.failures(entries):
        display.say(f"failed    {sentence}")
    display.say(f"written   {', '.join(str(comparison.folder / name) for name in (TABLE, CSV, PAGE))}")
    display.say(f"took      {(time.monotonic() - begun) / 60:.1f} minutes, without what was finished before")
    return entries


def _identified(comparison: Comparison, materials: Materials) -> str:
    """Writes what the comparison is made of, once; returns the versions and devices it began with if others are here.

    Raises JpeftError if it began with other rows or another base: one table would mix the two.
    """
    folder, model = Folder(comparison.folder), materials.base.model(comparison.grid.seeds[0])
    facts = made_of(model, materials.examples(model))
    if len(comparison.grid.learning_rates) > 1:
        facts["validation_size"] = f"{comparison.grid.validation_size:g}"
    # Without a run nothing can be mixed.
    begun = any(run for kind in ("rates", "runs") for run in comparison.folder.glob(f"{kind}/*/*"))
    mixed, before = folder.mixed(facts), folder.identity() if begun else {}
    if begun and mixed:
        raise JpeftError(
            f"output.folder: {folder.path} holds runs that began with other {', '.join(mixed)} than the configuration "
            "leads to now; one table would mix the two. Give another output.folder"
        )
    if not facts.keys() <= before.keys():
        folder.identify({**facts, **before})
    return ", ".join(before[key] for key in ("versions", "devices") if before.get(key, facts[key]) != facts[key])


def _entry(
    comparison: Comparison,
    label: str,
    rates: Mapping[str, float],
    tried: Sequence[Trial],
    ran: Sequence[Trial],
    materials: Materials,
    other: OtherText | None,
) -> Entry:
    mine = [trial for trial in ran if trial.label == label]
    config = comparison.base.model_copy(update={"method": comparison.methods[label]})
    broken = [trial for trial in mine or tried if trial.label == label and trial.message]
    costs: Costs | None = None
    unmeasured = None
    message = f"{broken[0].message} (rate {broken[0].rate:g}, seed {broken[0].seed})" if broken else None
    if message is None:
        try:
            costs = measured(comparison, mine, materials, other)
        except Exception as error:  # whatever it is, the scores are still worth a line
            unmeasured = trials.failure(error)
    return Entry(label, methods_of(config), rates.get(label), mine, costs, message, unmeasured)


def _notes(comparison: Comparison, materials: Materials, rates: Mapping[str, float], ran: Sequence[Trial]) -> list[str]:
    """How it was made, in sentences that hold for this comparison."""
    grid, machine = comparison.grid, summary.machine()
    seeds = ", ".join(map(str, grid.seeds))
    over = f"the mean of seeds {seeds}, ± their standard deviation" if len(grid.seeds) > 1 else f"of seed {seeds} alone"
    notes = [
        f"Scores are of {len(materials.test_rows):,} held-out rows after training on {len(materials.train_rows):,}: "
        f"{over}."
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
    if comparison.base.model.base is not None:
        notes[-1] += " The base is quantised; a merged model is in full precision, and what that saved is gone."
    devices = machine["devices"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    notes.append(f"{devices['count']} device of kind {devices['kind']}; {versions}; {time.strftime('%Y-%m-%d')}.")
    return notes
