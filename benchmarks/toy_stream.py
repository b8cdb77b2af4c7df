"""SFT against GRPO on the toy stream: what is learned, what is forgotten, and whether it is lost or only suppressed.

    python benchmarks/toy_stream.py --jobs 2

First every method's learning rate is chosen by its average accuracy on the validation split (seed 0), then each method
is run with three seeds and reported on the test split. A finished run is not run again. Results: a table in Markdown
and JSON under ``benchmarks/results/toy_stream``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from record import circumstances

from cpt_lightning.records import AccuracyMatrix, RunFolder
from cpt_lightning.report import Comparison, figures_of

ROOT = Path(__file__).resolve().parent.parent
HOUSE_STYLE = "<think>{thought}</think><answer>{answer}</answer>"
FORCED_PREFIX = "<think>let me think</think><answer>"
ARMS = {
    "grpo": ["-c", "configs/demo/grpo.yaml"],
    "sft_bare": ["-c", "configs/demo/sft.yaml", "--data.target", "{answer}"],
    "sft_house": ["-c", "configs/demo/sft.yaml", "--data.target", HOUSE_STYLE],
}
LEARNING_RATES = {"grpo": [1e-5, 3e-5, 1e-4], "sft_bare": [3e-5, 1e-4, 3e-4], "sft_house": [3e-5, 1e-4, 3e-4]}
"""Tried for each arm: three steps around what earlier trials found; for GRPO 3e-4 was too much on every base."""


@dataclass(frozen=True)
class Run:
    """One run of the study; its folder tells whether it has been done."""

    arm: str
    learning_rate: float
    seed: int
    split: str
    out: Path
    steps: int

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self.out / f"{self.split}_{self.arm}_lr{self.learning_rate:g}_steps{self.steps}_seed{self.seed}"

    @property
    def matrix(self) -> AccuracyMatrix:
        """What it measured."""
        return AccuracyMatrix.load(self.folder / "accuracy_matrix.json")

    @property
    def figures(self) -> dict[str, float | None]:
        """What is compared."""
        minutes = float((self.folder / "seconds.txt").read_text()) / 60
        return {**figures_of(RunFolder(self.folder)), "minutes": minutes}

    @property
    def is_done(self) -> bool:
        """Whether the last task has been learned."""
        return (self.folder / "seconds.txt").exists()

    def __call__(self) -> None:
        if self.is_done:
            return
        command = [sys.executable, "-m", "cpt_lightning", "fit", *ARMS[self.arm], "--run_dir", str(self.folder)]
        command += ["--model.init_args.optimizer.init_args.lr", str(self.learning_rate)]
        command += ["--model.init_args.forced_prefix", FORCED_PREFIX, "--data.evaluate_on", self.split]
        command += ["--seed_everything", str(self.seed), "--data.steps", str(self.steps)]
        command += ["--data.prompts_per_step", "24", "--trainer.enable_progress_bar", "false"]
        start = time.perf_counter()
        with (self.out / f"{self.folder.name}.log").open("w") as log:
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=one_thread, check=True, stdout=log, stderr=subprocess.STDOUT)
        (self.folder / "seconds.txt").write_text(f"{time.perf_counter() - start:.0f}\n")
        print(f"{self.folder.name}: {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Runs what is missing, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="per task")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "toy_stream")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "toy_stream")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)

    def runs(split: str, seeds: list[int], rates: dict[str, list[float]]) -> list[Run]:
        planned = [(arm, rate, seed) for arm in options.arms for rate in rates[arm] for seed in seeds]
        found = [Run(arm, rate, seed, split, options.runs, options.steps) for arm, rate, seed in planned]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda run: run(), found))
        return found

    choosing = runs("val", [0], LEARNING_RATES)
    chosen = {
        arm: max((run for run in choosing if run.arm == arm), key=lambda run: run.matrix.metrics()["average_accuracy"])
        for arm in options.arms
    }
    final = runs("test", options.seeds, {arm: [run.learning_rate] for arm, run in chosen.items()})
    report(choosing, final, options.results)


def report(choosing: list[Run], final: list[Run], results: Path) -> None:
    """Writes the tables of both halves."""
    results.mkdir(parents=True, exist_ok=True)
    validation = [{**name(run), **run.figures} for run in choosing]
    test = [{**name(run), **run.figures} for run in final]
    matrices = {run.folder.name: run.matrix.to_json() for run in [*choosing, *final]}
    record = {"environment": circumstances(), "validation": validation, "test": test, "matrices": matrices}
    (results / "toy_stream.json").write_text(json.dumps(record, indent=1) + "\n")
    text = "\n".join(
        [
            compared(final).markdown("SFT and GRPO on the toy stream, test split"),
            f"`python benchmarks/toy_stream.py`, {json.dumps(circumstances())}. Answers are forced to begin with "
            f"`{FORCED_PREFIX}`.\n",
            compared(choosing).markdown("Learning rates, chosen by average accuracy on the validation split (seed 0)"),
        ]
    )
    (results / "README.md").write_text(text)
    print(text)


def name(run: Run) -> dict[str, str | float]:
    """What tells a run from others."""
    return {"arm": run.arm, "learning_rate": run.learning_rate, "seed": run.seed}


def compared(runs: list[Run]) -> Comparison:
    """The runs by arm and learning rate."""
    arms: dict[str, dict[int, dict[str, float | None]]] = {}
    for run in runs:
        arms.setdefault(f"{run.arm}, lr {run.learning_rate:g}", {})[run.seed] = run.figures
    return Comparison(arms)


if __name__ == "__main__":
    main()
