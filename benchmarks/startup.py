"""What starting costs: `import jpeft` beside `import jax, flax.nnx`, and `jpeft --help` beside a bare interpreter.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import jax, flax.nnx": ["-c", "import jax, flax.nnx"],
    "import jpeft": ["-c", "import jpeft"],
    "jpeft --help": ["-m", "train", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(args.rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            if number:  # the first round fills the file cache
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, median in medians.items():
        print(f"{name:22} {median:.2f} s")
    print(f"import jpeft is {medians['import jpeft'] / medians['import jax, flax.nnx']:.2f}x import jax, flax.nnx")
    beyond = medians["jpeft --help"] - medians["python -c pass"]
    print(f"jpeft --help answers {beyond:.2f} s after the interpreter's start")


if __name__ == "__main__":
    main()
