"""What the runs of a comparison tell beside its table: how losses fall, AdaLoRA's ranks, UniPELT's gates.

    jpeft compare configs/compare/small.yaml
    python benchmarks/comparison.py runs/compare-small

Prints the mean training loss in each fifth of the steps, for every method at its rate over all seeds and for every rate
that was tried; the largest times that the device waited between the steps of a run; how many singular values AdaLoRA
keeps, by module and layer, mean over seeds; and how far UniPELT's gates are open, by part and layer, mean over the
tokens of 64 held-out rows and over seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import jpeft
from train import batches, session
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


def averages(runs: list[dict[str, Any]]) -> None:
    """Prints the mean over `runs` of what each has by module and layer."""
    for module in runs[0] if runs else ():
        mean = np.mean([np.asarray(run[module]) for run in runs], axis=0)
        print(f"{module:50} {' '.join(f'{value:.2f}' for value in mean)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output.folder of a jpeft compare")
    folder = parser.parse_args().folder
    print("training loss by fifths of the steps")
    for method in sorted((folder / "runs").iterdir()):
        print(f"{method.name:16} all seeds  {fifths(sorted(method.iterdir()))}")
        for run in sorted((folder / "rates" / method.name).glob("*")):
            print(f"{'':16} {run.name}  {fifths([run])}")
    seconds = [
        json.loads((run / SUMMARY).read_text(encoding="utf-8"))["seconds"]
        for kind in ("runs", "rates")
        for run in folder.glob(f"{kind}/*/*")
    ]
    largest = {name: max(one[name] for one in seconds) for name in ("between_steps", "input")}
    train = [one["train"] for one in seconds]
    print(f"\n{len(seconds)} runs with steps of {min(train):.0f} to {max(train):.0f} s together; at most ", end="")
    print(f"{largest['between_steps']:.1f} s between them, {largest['input']:.1f} s of it for input")
    print("\nof AdaLoRA's singular values are kept, by layer")
    averages([jpeft.adalora_ranks(session.open_run(run).model) for run in sorted(folder.glob("runs/adalora/*"))])
    print("\nUniPELT's gates are open, by layer")
    averages([gates(run) for run in sorted(folder.glob("runs/unipelt/*"))])


if __name__ == "__main__":
    main()
