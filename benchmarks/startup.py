"""How long a user waits before anything happens: help texts of `cpt`, and imports.

    python benchmarks/startup.py [--repeats 5]

Every figure is the median of fresh processes, interpreter included; files are cached by then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from record import write_record

CPT = [sys.executable, "-m", "cpt_lightning"]
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import cpt_lightning": [sys.executable, "-c", "import cpt_lightning"],
    "import cpt_lightning.modules": [sys.executable, "-c", "import cpt_lightning.modules"],
    "cpt --help": [*CPT, "--help"],
    "cpt fit --help": [*CPT, "fit", "--help"],
}


def main() -> None:
    """Runs everything, prints the table, writes the record."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    options = options.parse_args()
    for command in COMMANDS.values():
        seconds(command)  # brings its files into the cache
    rounds = [{name: seconds(command) for name, command in COMMANDS.items()} for _ in range(options.repeats)]
    results = {name: median(times[name] for times in rounds) for name in COMMANDS}
    for name, time in results.items():
        print(f"  {time:7.2f} s  {name}")
    write_record(options.out, {"median_s": results, "rounds": rounds})


def seconds(command: list[str]) -> float:
    """How long a command takes.

    Raises:
        CalledProcessError: It fails.
    """
    start = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - start


if __name__ == "__main__":
    main()
