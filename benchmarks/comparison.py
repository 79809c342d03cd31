"""What the runs of a comparison tell beside its table: how losses fall, AdaLoRA's ranks, UniPELT's gates.

    jpeft compare configs/compare/small.yaml
    python benchmarks/comparison.py runs/compare-small --picture docs/adalora-ranks.svg

    jpeft compare configs/compare/small-parts.yaml
    jpeft train configs/unipelt.yaml
    python benchmarks/comparison.py runs/compare-small-parts --gates runs/unipelt

Prints the mean training loss in each fifth of the steps, for every method at its rate over all seeds and for every rate
that was tried; the largest times that the device waited between the steps of a run; how many singular values AdaLoRA
keeps, by module and layer, mean over seeds; how far UniPELT's gates are open, by part and layer, mean over the
tokens of 64 held-out rows and over seeds; and how Pfeiffer's adapters score, trained with AdapterDrop (`adapter-drop`)
and without (`pfeiffer`), when those of the lowest layers are taken away.

--picture draws AdaLoRA's ranks; --gates prints those of further runs.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import jpeft
from train import batches, scoring, session
from train.compare.run import CSV
from train.data import rows_of
from train.summary import SUMMARY
from train.trackers import METRICS, read


def fifths(runs: list[Path]) -> str:
    """The mean loss in each fifth of the steps."""
    losses = [[entry["loss"] for entry in read(run / METRICS)[0] if "loss" in entry] for run in runs]
    parts = [[np.mean(part) for part in np.array_split(one, 5)] for one in losses]
    return " ".join(f"{value:.2f}" for value in np.mean(parts, axis=0))


def gates(folder: Path, rows: int = 64) -> dict[str, np.ndarray]:
    """How far the gates of a UniPELT run are open, [layers], by the module at which they stand."""
    run = session.open_run(folder)
    held_out = rows_of(run.config.data, run.task)[1]
    examples = run.task.examples(held_out.select(range(rows)), run.reader)
    batch = batches.arrays(examples, batches.rounded(max(map(len, examples))), len(examples))
    seen = jpeft.observe(run.model, batch["input_ids"], attention_mask=batch["attention_mask"])
    real = batch["attention_mask"] / batch["attention_mask"].sum()
    found: dict[str, dict[int, float]] = {}
    for name, gate in seen.items():
        parts = name.split("/")
        layer = next(part for part in parts if part.isdecimal())
        module = "/".join(part for part in parts if part != layer)
        found.setdefault(module, {})[int(layer)] = float((np.asarray(gate, np.float32) * real).sum())
    return {module: np.array([layers[index] for index in sorted(layers)]) for module, layers in found.items()}


def dropped(folder: Path, most: int = 3) -> list[float]:
    """The score of a run without the adapters of its lowest layers, of 0, 1, ... `most` of them."""
    run = session.open_run(folder)
    task = scoring.task_of(run, *rows_of(run.config.data, run.task))
    scores = []
    for layers in range(most + 1):
        model = jpeft.drop_adapters(run.model, range(layers)) if layers else run.model
        score = scoring.score_of(dataclasses.replace(run, model=model), task)
        scores.append(next(iter(score.metrics.values())))
    return scores


def averages(runs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Prints and returns the mean over `runs` of what each has by module and layer."""
    means = {}
    for module in runs[0] if runs else ():
        means[module] = np.mean([np.asarray(run[module]) for run in runs], axis=0)
        print(f"{module:50} {' '.join(f'{value:.2f}' for value in means[module])}")
    return means


def picture(values: dict[str, np.ndarray], title: str) -> str:
    """An SVG of a field for each module and layer, the darker the larger its value."""
    cell, left, top = 56, 270, 56
    layers, most = max(map(len, values.values())), max(value.max() for value in values.values())
    width, height = left + cell * layers + 16, top + cell // 2 * len(values) + 16
    font = 'font-family="system-ui, sans-serif" font-size="13"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {font}>',
        f"<title>{title}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-weight="600" fill="#1f2328">{title}</text>',
    ]
    for layer in range(layers):
        x = left + cell * layer + cell // 2
        lines.append(f'<text x="{x}" y="{top - 8}" text-anchor="middle" fill="#59636e">layer {layer}</text>')
    for row, (module, found) in enumerate(values.items()):
        y = top + cell // 2 * row
        name = "/".join(module.split("/")[-3:])
        lines.append(f'<text x="{left - 12}" y="{y + 18}" text-anchor="end" fill="#1f2328">{name}</text>')
        for layer, value in enumerate(found):
            x, share = left + cell * layer, float(value / most) if most else 0.0
            ink = "#ffffff" if share > 0.55 else "#1f2328"
            box = f'x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell // 2 - 2}"'
            lines.append(f'<rect {box} rx="3" fill="#0969da" fill-opacity="{0.06 + 0.94 * share:.2f}"/>')
            lines.append(f'<text x="{x + cell // 2}" y="{y + 18}" text-anchor="middle" fill="{ink}">{value:.1f}</text>')
    return "\n".join([*lines, "</svg>\n"])


def counted(folder: Path) -> dict[str, list[Path]]:
    """{label: its runs at the rate that was chosen}, of the methods that did not fail."""
    with (folder / CSV).open(encoding="utf-8", newline="") as file:
        rates = {row["label"]: float(row["learning_rate"]) for row in csv.DictReader(file) if row["score"]}
    return {label: sorted(folder.glob(f"runs/{label}/rate-{rate:g}-seed-*")) for label, rate in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output.folder of a jpeft compare")
    parser.add_argument("--picture", type=Path, help="new SVG of the ranks that AdaLoRA keeps", metavar="FILE")
    parser.add_argument("--gates", type=Path, nargs="+", default=[], help="runs of UniPELT", metavar="RUN")
    options = parser.parse_args()
    folder = options.folder
    runs = counted(folder)
    if not runs:
        parser.error(f"{folder}: every method failed")
    print("training loss by fifths of the steps")
    for label, mine in sorted(runs.items()):
        print(f"{label:16} all seeds  {fifths(mine)}")
        for run in sorted((folder / "rates" / label).glob("*/adapter")):
            print(f"{'':16} {run.parent.name}  {fifths([run.parent])}")
    seconds = [
        json.loads((run.parent / SUMMARY).read_text(encoding="utf-8"))["seconds"]
        for kind in ("runs", "rates")
        for run in folder.glob(f"{kind}/*/*/adapter")
    ]
    largest = {name: max(one[name] for one in seconds) for name in ("between_steps", "input")}
    train = [one["train"] for one in seconds]
    print(f"\n{len(seconds)} runs with steps of {min(train):.0f} to {max(train):.0f} s together; at most ", end="")
    print(f"{largest['between_steps']:.1f} s between them, {largest['input']:.1f} s of it for input")
    print("\nsingular values that AdaLoRA keeps, by layer, if it is among the methods")
    ranks = averages([jpeft.adalora_ranks(session.open_run(run).model) for run in runs.get("adalora", [])])
    if options.picture and ranks:
        text = picture(ranks, "Singular values that AdaLoRA keeps, mean over seeds")
        options.picture.write_text(text, encoding="utf-8")
    print("\nhow far UniPELT's gates are open, by layer, if it is among the methods")
    averages([gates(run) for run in runs.get("unipelt", [])])
    for label in ("pfeiffer", "adapter-drop"):
        if label in runs:
            scores = np.array([dropped(run) for run in runs[label]])
            said = ", ".join(f"{column.mean():.3f} ± {column.std(ddof=1):.3f}" for column in scores.T)
            print(f"\n{label} without the adapters of the lowest 0, 1, 2, 3 layers: {said}")
    for run in options.gates:
        print(f"\nhow far those of {run} are")
        averages([gates(run)])


if __name__ == "__main__":
    main()
