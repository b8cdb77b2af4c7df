"""The accuracy matrix of an arm, averaged over its seeds."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpt_lightning.functional.intervals import wilson_interval
from cpt_lightning.pictures.matrix import columns_of
from cpt_lightning.records import AccuracyMatrix
from cpt_lightning.records.matrix import Cell, Scores
from cpt_lightning.report.arms import Arm
from cpt_lightning.report.comparison import bounds, number


@dataclass(frozen=True)
class Entry:
    """A cell of the table.

    Args:
        accuracy: Mean over seeds, in %.
        spread: ± the standard deviation over seeds; of one seed Wilson's 95 % interval, which near 0 and 100 % reaches
            further to one side.
        just_learned: Whether the task had just been learned.
    """

    accuracy: float
    spread: str
    just_learned: bool


def matrices_of(arm: Arm) -> list[AccuracyMatrix]:
    """Those of its seeds that have come as far as the first."""
    found = [run.matrix for run in arm.runs.values() if run.matrix is not None]
    return [matrix for matrix in found if _shape(matrix) == _shape(found[0])]


def mean_matrix(matrices: Sequence[AccuracyMatrix]) -> AccuracyMatrix:
    """Accuracies averaged over seeds."""
    first = matrices[0]
    zero_shots = [matrix.zero_shot for matrix in matrices if matrix.zero_shot is not None]
    rows = zip(*(matrix.rows for matrix in matrices), strict=True)
    return replace(first, zero_shot=_mean(zero_shots) if zero_shots else None, rows=list(map(_mean, rows)))


def table_of(matrices: Sequence[AccuracyMatrix]) -> tuple[list[str], dict[str, list[Entry | None]]]:
    """Names of the stages, and for each task and probe an entry per stage; ``None`` where it was not measured."""
    columns = columns_of(mean_matrix(matrices))
    measured = [[scores for _, scores, _ in columns_of(matrix)] for matrix in matrices]
    table = {
        name: [_entry([seed[place][name] for seed in measured], name in learned) if name in scores else None
               for place, (_, scores, learned) in enumerate(columns)]
        for name in matrices[0].names
    }  # fmt: skip
    return [name for name, _, _ in columns], table


def matrices_csv(arms: Sequence[Arm]) -> str:
    """All measurements of all runs, a line each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "seed", "stage", "after", "name", "kind", "accuracy", "num_samples", "low", "high"])
    for arm in arms:
        for seed, run in arm.runs.items():
            if run.matrix is None:
                continue
            for stage, (after, scores, _) in enumerate(columns_of(run.matrix), start=run.matrix.zero_shot is None):
                for name in filter(scores.__contains__, run.matrix.names):
                    cell, kind = scores[name], "task" if name in run.matrix.tasks else "probe"
                    interval = wilson_interval(cell["accuracy"], cell["num_samples"])
                    numbers = [f"{value:.6f}" for value in (cell["accuracy"], *interval)]
                    numbers.insert(1, str(cell["num_samples"]))
                    writer.writerow([arm.name, seed, stage, after, name, kind, *numbers])
    return text.getvalue()


def _shape(matrix: AccuracyMatrix) -> tuple[list[list[str]], list[str], list[set[str]]]:
    return matrix.stages, matrix.names, [set(scores) for scores in (matrix.zero_shot or {}, *matrix.rows)]


def _mean(scores: Sequence[Scores]) -> Scores:
    return {
        name: Cell(accuracy=statistics.mean(each[name]["accuracy"] for each in scores), num_samples=cell["num_samples"])
        for name, cell in scores[0].items()
    }


def _entry(cells: Sequence[Cell], just_learned: bool) -> Entry:
    accuracies = [100 * cell["accuracy"] for cell in cells]
    if len(cells) > 1:
        return Entry(statistics.mean(accuracies), f"± {number(statistics.stdev(accuracies))}", just_learned)
    low, high = wilson_interval(cells[0]["accuracy"], cells[0]["num_samples"])
    return Entry(accuracies[0], bounds((100 * low, 100 * high)), just_learned)
