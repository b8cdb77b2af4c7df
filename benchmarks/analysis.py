"""Which of the papers' claims about forgetting hold on the toy world?

    python benchmarks/analysis.py --jobs 2

Runs the study of configs/studies/analysis.yaml, as ``cpt study`` does (finished runs are skipped), and writes to
``benchmarks/results/analysis``: every run (``runs.csv``), every method at every learning rate (``methods.md``), the
claims as differences between methods (``claims.md``), what foretells the loss of prior knowledge (``predictors.md``),
and pictures.

A method's learning rate in ``claims.md`` is the one at which it learns most, mean over seeds, on the rows that are
shown, unless the claim is about a rate; ``methods.md`` has them all. Intervals are 95 %: of differences by Student's t
over seeds (paired: a seed draws the same rows for all), of predictors by drawing methods with their rates anew.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from analysis_pictures import frontier, predictors
from claims import Point, best_lr, learning_rates, paired_difference, prediction, values_of
from record import write_record

from cpt_lightning.cli.study.arms import Study
from cpt_lightning.cli.study.runner import is_finished
from cpt_lightning.pictures.files import save_png
from cpt_lightning.records import RunFolder
from cpt_lightning.records.files import replace_text
from cpt_lightning.report import distances_of, figures_of

ROOT = Path(__file__).resolve().parent.parent
STUDY = "configs/studies/analysis.yaml"
POINTS = {
    "learning": "right after a task, %",
    "forgetting": "forgotten, points",
    "probes": "probes, points",
    "probes, lowest": "lowest on the way",
    "probes, forced": "probes, forced style",
}
SHOWN = {
    **POINTS,
    "forward_kl": "KL(base, model)",
    "weights": "weight distance",
    "fisher": "Fisher distance",
    "base_perplexity": "base perplexity of the text",
}
"""Columns of ``methods.md``; those of ``claims.md`` are in points."""
PREDICTORS = {
    "forward_kl": "KL(base, model), nats per answer, last task's end",
    "reverse_kl": "KL(model, base), nats per answer, last task's end",
    "weights": "Euclidean distance of the weights from the base",
    "fisher": "distance by the Fisher information of the probes",
    "log_base_perplexity": "log of the base's perplexity of the first text learned",
    "influence": "fall of log p of the base's answers to probes, first measured update",
    "log_lbk": "log of LBK, first measured update",
}
"""What may foretell the loss of the probes. The last three are known at the beginning of the first task."""
CLAIMS = {
    "RFT keeps prior knowledge, SFT on gold answers does not (A, B)": ("grpo", "sft_bare"),
    "... by RLOO (A)": ("rloo", "sft_bare"),
    "RFT keeps more than SFT on a teacher's reasoning (B)": ("grpo", "sft_teacher"),
    "RFT keeps more than SFT on gold answers in the base's own style": ("grpo", "sft_house"),
    "RFT keeps more than SFT on its own right rollouts (B: nearly the same)": ("grpo", "sft_rollouts"),
    "SFT on rollouts keeps more than on gold answers (B)": ("sft_rollouts", "sft_bare"),
    "SFT on a teacher's reasoning keeps more than on gold answers (B)": ("sft_teacher", "sft_bare"),
    "negative examples do not matter (RL's Razor)": ("one_zero", "grpo"),
    "RLOO is as good as GRPO (A)": ("rloo", "grpo"),
    "KL to the policy at a task's start is not why: GRPO (A)": ("grpo_kl 3e-5", "grpo 3e-5"),
    "... at the rate at which GRPO forgets": ("grpo_kl 3e-4", "grpo 3e-4"),
    "... RLOO": ("rloo_kl 3e-5", "rloo 3e-5"),
    "... at the rate at which RLOO forgets": ("rloo_kl 3e-4", "rloo 3e-4"),
    "... 1-0 REINFORCE": ("one_zero_kl 3e-5", "one_zero 3e-5"),
    "... at the rate at which 1-0 REINFORCE forgets": ("one_zero_kl 3e-4", "one_zero 3e-4"),
}
"""What is said, and the methods whose difference tells, with their learning rate if it is not to be the best."""


def points_of(study: Study) -> Iterator[Point]:
    """The finished runs."""
    for run in study.runs():
        if is_finished(run):
            method, _, lr = run.arm.partition("_lr_")
            folder = RunFolder(run.folder)
            figures = {name: value for name, value in figures_of(folder).items() if value is not None}
            yield Point(method, lr, run.seed, {**figures, **measured(folder)})


def measured(run: RunFolder) -> dict[str, float]:
    """What callbacks found: distances at the last task's end, and what the first measured update was like."""
    distances = distances_of(run, len(run.matrix.rows))
    first = json.loads((run.path / "influence.json").read_text())["measurements"][0]
    probes = [first["on"][probe] for probe in run.matrix.probes]
    text = statistics.mean(map(math.log, first["base_perplexity"].values()))
    return {
        **distances,
        "log_base_perplexity": text,
        "base_perplexity": math.exp(text),
        "influence": -statistics.mean(probe["log_prob_change"] for probe in probes),
        "log_lbk": math.log(statistics.mean(probe["lbk"] for probe in probes)),
    }


def write_runs(points: Sequence[Point], out: Path) -> None:
    """A line per run."""
    names = list(points[0].figures)
    with (out / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "lr", "seed", *names])
        for point in points:
            row = [f"{point.figures.get(name, math.nan):.6g}" for name in names]
            writer.writerow([point.method, point.lr, point.seed, *row])


def methods_table(points: Sequence[Point]) -> str:
    """Every method at every learning rate: means, and standard deviations over seeds."""
    rows = []
    for method in dict.fromkeys(point.method for point in points):
        for lr in learning_rates(points, method):
            cells = []
            for name in SHOWN:
                values = list(values_of(points, name, method, lr).values())
                write = "{:.1f}".format if name in POINTS else _short
                cells.append(f"{write(statistics.mean(values))} ± {write(statistics.stdev(values))}")
            rows.append([method, lr, *cells])
    return _markdown(["method", "lr", *SHOWN.values()], rows)


def claims_table(points: Sequence[Point]) -> str:
    """Each claim as differences of two methods; those about a rate that was not run are left out."""
    rows = []
    for claim, pair in CLAIMS.items():
        compared = [_with_rate(points, each) for each in pair]
        if not all(lr in learning_rates(points, method) for method, lr in compared):
            continue  # of another study
        cells = []
        for figure in POINTS:
            one, other = (values_of(points, figure, method, lr) for method, lr in compared)
            mean, low, high = paired_difference(one, other)
            cells.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})")
        rows.append([claim, " - ".join(f"{method} {lr}" for method, lr in compared), *cells])
    return _markdown(["claim", "difference", *POINTS.values()], rows)


def _with_rate(points: Sequence[Point], named: str) -> tuple[str, str]:
    """A method and the learning rate named after it, else the one at which it learns most."""
    method, _, lr = named.partition(" ")
    return method, lr or best_lr(points, method, by="learning")


def predictors_table(points: Sequence[Point]) -> str:
    """How well each figure foretells what the probes lose, over all runs and over those of usual learning rates."""
    highest = max((point.lr for point in points), key=float)
    usual = [point for point in points if point.lr != highest]
    rows = []
    for figure, label in PREDICTORS.items():
        row = [label]
        for chosen in (points, usual):
            found = prediction(chosen, figure, "lost")
            row += [_interval(found.r_squared), _interval(found.rank_correlation)]
        rows.append(row)
    heads = [f"{name}, {which}" for which in (f"all {len(points)} runs", f"without lr {highest} ({len(usual)})")
             for name in ("R² of a parabola", "rank correlation")]  # fmt: skip
    return _markdown(["figure", *heads], rows)


def _interval(found: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*found)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.1e}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Runs what is not finished, and writes tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--study", default=STUDY, help="another study of the same methods")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/analysis", help="folder of the results")
    options = parser.parse_args()
    subprocess.run(
        [sys.executable, "-m", "cpt_lightning", "study", options.study, "--jobs", str(options.jobs)], check=True
    )
    points = [
        Point(point.method, point.lr, point.seed, {**point.figures, "lost": -point.figures["probes"]})
        for point in points_of(Study.load(options.study))
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    write_runs(points, options.out)
    tables = {"methods": methods_table, "claims": claims_table, "predictors": predictors_table}
    for name, table in tables.items():
        replace_text(options.out / f"{name}.md", text := table(points))
        print(f"\n{text}")
    save_png(frontier(points), options.out / "learning_forgetting.png")
    save_png(predictors(points, PREDICTORS), options.out / "predictors.png")
    write_record(options.out / "record.json", {"study": options.study, "num_runs": len(points)})


if __name__ == "__main__":
    main()
