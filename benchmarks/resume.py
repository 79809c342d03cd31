"""Kills a real run at random moments, some while a checkpoint is written, and compares what it leaves in the end, bit
for bit, with a run that was never interrupted.

python benchmarks/resume.py --kills 20 --config configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import jpeft
from train import session, trackers
from train.folder import CHECKPOINTS


def command(config: str, folder: Path, every: int) -> list[str]:
    overrides = [f"output.folder={folder}", f"checkpoints.every={every}", "evaluation.samples=0"]
    return [sys.executable, "-m", "train", "train", config, *overrides]


def steps(folder: Path) -> set[int]:
    return {int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit()}


def half_written(folder: Path, since: float) -> bool:
    try:
        return any(path.stat().st_mtime > since for path in (folder / CHECKPOINTS).glob("*tmp*"))
    except FileNotFoundError:  # renamed at this moment
        return False


def killed(arguments: list[str], folder: Path, chosen: random.Random, *, while_saving: bool) -> str | None:
    """Starts the run and kills it; says when that was, or None if the run ended first."""
    process, since, stood = subprocess.Popen(arguments, stdout=subprocess.DEVNULL), time.time(), steps(folder)
    while process.poll() is None:
        if half_written(folder, since) if while_saving else steps(folder) - stood:
            break
        time.sleep(0.001)
    if not while_saving:
        time.sleep(chosen.uniform(0, 1))
    running = process.poll() is None
    process.kill()
    process.wait()
    if not running:
        return None
    now = steps(folder)
    state = "while a checkpoint was written" if half_written(folder, since) else "between checkpoints"
    return f"{state}, the last whole one of step {max(now, default=0)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chosen = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        whole, run = Path(place) / "whole", Path(place) / "run"
        subprocess.run(command(args.config, whole, args.every), check=True, stdout=subprocess.DEVNULL)
        kills = 0
        while kills < args.kills:
            said = killed(command(args.config, run, args.every), run, chosen, while_saving=kills % 3 == 0)
            if said is None:
                break
            kills += 1
            print(f"kill {kills}: {said}", flush=True)
        done = subprocess.run(command(args.config, run, args.every), check=True, stdout=subprocess.PIPE, text=True)
        resumes = [line for line in done.stdout.splitlines() if line.startswith("resumed")]
        one, other = (jpeft.partition(session.open_run(folder).model).adapter for folder in (whole, run))
        differing = sum(
            int(
                np.unpackbits(
                    np.frombuffer(np.asarray(one[key]).tobytes(), np.uint8)
                    ^ np.frombuffer(np.asarray(other[key]).tobytes(), np.uint8)
                ).sum()
            )
            for key in one
        )
        losses = [
            [entry["loss"] for entry in trackers.read(folder / trackers.METRICS)[0] if "loss" in entry]
            for folder in (whole, run)
        ]
        print(*resumes, sep="\n")
        bits = 8 * sum(np.asarray(array).nbytes for array in one.values())
        print(f"{kills} kills, {len(losses[1])} steps, losses equal: {losses[0] == losses[1]}")
        print(f"{differing} of the adapter's {bits:,} bits differ")


if __name__ == "__main__":
    main()
