"""What the runs of a comparison tell beside its table: how losses fall, how long the device waited, AdaLoRA's ranks.

    jpeft compare configs/compare/small.yaml
    python benchmarks/comparison.py runs/compare-small

Prints the mean training loss in each fifth of the steps, for every method at its rate over all seeds and for every rate
that was tried; the largest times that the device waited between the steps of a run; and how many singular values
AdaLoRA keeps, by module and layer, mean over seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import jpeft
from train import session
from train.summary import SUMMARY
from train.trackers import METRICS, read


def fifths(runs: list[Path]) -> str:
    """The mean loss in each fifth of the steps."""
    losses = [[entry["loss"] for entry in read(run / METRICS)[0] if "loss" in entry] for run in runs]
    parts = [[np.mean(part) for part in np.array_split(one, 5)] for one in losses]
    return " ".join(f"{value:.2f}" for value in np.mean(parts, axis=0))


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
    ranks: dict[str, list[Any]] = {}
    for run in sorted(folder.glob("runs/adalora/*")):
        for module, kept in jpeft.adalora_ranks(session.open_run(run).model).items():
            ranks.setdefault(module, []).append(np.asarray(kept))
    for module, kept in ranks.items():
        print(f"{module:40} {' '.join(f'{value:.1f}' for value in np.mean(kept, axis=0))}")


if __name__ == "__main__":
    main()
