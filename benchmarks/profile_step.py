"""Where a GRPO step on the tiny model spends its time.

    OMP_NUM_THREADS=1 python benchmarks/profile_step.py [--num_steps 20] [--out FILE] [any option of cpt fit]

The very command of the demo (progress bar, TensorBoard, callbacks and all), without its probes. A step is measured
from the end of the one before, so it holds data loading, hooks and logging; "rest" is what is neither rollout nor
reward nor update.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from record import write_record

from cpt_lightning.cli import main as cpt

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "reward", "update")
NUM_WARM_UP = 3
LIMIT_REST = 0.05


def main() -> None:
    """Runs the steps, prints the table, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=20, help="steps of each task")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "profile_step.json")
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = run(options.num_steps, overrides, Path(folder))
    results = summarize(measured["steps"][NUM_WARM_UP:], measured["around"])
    print_table(results)
    write_record(options.out, results)


def run(num_steps: int, overrides: Sequence[str], folder: Path) -> dict:
    """Trains, and gives what :class:`~step_timer.StepTimer` wrote."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # not the profiler's own hundred lines
    measured = folder / "steps.json"
    options = {
        "--run_dir": folder / "run",
        "--data.steps": num_steps,
        "--data.probes": "null",
        "--trainer.profiler": "simple",
        "--trainer.callbacks+": "step_timer.StepTimer",
        "--trainer.callbacks.out": measured,
    }
    config = str(ROOT / "configs" / "demo" / "grpo.yaml")
    cpt(["fit", "-c", config, *(str(part) for option in options.items() for part in option), *overrides])
    return json.loads(measured.read_text(encoding="utf-8"))


def summarize(steps: Sequence[dict[str, float]], around: dict[str, float]) -> dict:
    """Medians in seconds; shares of the summed time, so that a slow step counts with its weight."""
    for step in steps:
        step["rest"] = step["step"] - sum(step[phase] for phase in PHASES)
    total = sum(step["step"] for step in steps)
    names = ("step", *PHASES, "rest")
    largest = sorted(around.items(), key=lambda item: -item[1])[:8]
    return {
        "num_steps": len(steps),
        "median_s": {name: median(step[name] for step in steps) for name in names},
        "share": {name: sum(step[name] for step in steps) / total for name in names},
        "within_the_rest_s": dict(largest),
    }


def print_table(results: dict) -> None:
    """The phases, then what the Trainer did in the rest."""
    print(f"{results['num_steps']} steps   median      share")
    for name, share in results["share"].items():
        print(f"  {name:8} {results['median_s'][name] * 1e3:9.1f} ms  {share:8.1%}")
    print("within the rest, mean per step, the first included:")
    for name, seconds in results["within_the_rest_s"].items():
        print(f"  {seconds * 1e3:9.1f} ms  {name}")
    rest = results["share"]["rest"]
    print(f"rest: {rest:.1%} of the step, {'within' if rest < LIMIT_REST else 'ABOVE'} the limit of {LIMIT_REST:.0%}")


if __name__ == "__main__":
    main()
