"""How far figures would move with other test rows of the same kind: 95 % intervals, paired between runs."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from cpt_lightning.functional.intervals import percentile_interval, resampled_means
from cpt_lightning.records import AccuracyMatrix, RunFolder
from cpt_lightning.records.matrix import Cell, Scores
from cpt_lightning.records.run import MATRIX, SAMPLES
from cpt_lightning.report.arms import Arm
from cpt_lightning.report.figures import Figures, changes_by_probe, scores_of

NUM_DRAWS = 1000
LEVEL = 0.95

Interval = tuple[float, float]
Part = Literal["accuracy", "forced_accuracy"]
PARTS: tuple[Part, ...] = ("accuracy", "forced_accuracy")
Draws = dict[str, np.ndarray]
"""``[D]`` values of each score, and of the change of each probe, over draws of test rows."""


class Disagreement(ValueError):
    """What a run said does not come to what it scored."""


@dataclass(frozen=True)
class RowScores:
    """What a run scored row by row.

    Args:
        rows: By task or probe, names of the test rows, sorted.
        scores: By task or probe and part, ``[R, n]`` scores of the n rows before training (if that was measured) and
            after each stage; ``nan`` where the matrix has none.
    """

    rows: Mapping[str, Sequence[str]]
    scores: Mapping[tuple[str, Part], np.ndarray]


def row_scores(run: RunFolder) -> RowScores | None:
    """Reads them from what the run said; ``None`` without a file of that, or without scores.

    Raises:
        Disagreement: The file lacks answers that the matrix counts, or says other than it.
        ValueError: It is broken.
    """
    matrix = run.matrix
    if matrix is None or not matrix.rows:
        return None
    read: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for row in run.samples():
        read.setdefault((row["task"], row["stage"]), {})[row["row_id"]] = row.get("parts") or row
    if not read:
        return None
    stages = range(0 if matrix.zero_shot else 1, len(matrix.rows) + 1)
    rows = {name: sorted(read.get((name, stages[-1]), {})) for name in matrix.names}
    scores: dict[tuple[str, Part], np.ndarray] = {}
    for name in matrix.names:
        cells = [measured[name] for measured in _measured(matrix) if name in measured]
        for part in PARTS:
            if not cells or any(part not in cell for cell in cells):
                continue
            found = [[read.get((name, stage), {}).get(row, {}).get(part) for row in rows[name]] for stage in stages]
            scores[name, part] = np.array(found, dtype=float)  # nan for None
            _check(run, name, part, scores[name, part], matrix)
    return RowScores(rows, scores)


def _measured(matrix: AccuracyMatrix) -> list[Scores]:
    return [*([matrix.zero_shot] if matrix.zero_shot else []), *matrix.rows]


def _check(run: RunFolder, name: str, part: Part, scores: np.ndarray, matrix: AccuracyMatrix) -> None:
    for found, cells in zip(scores, _measured(matrix), strict=True):
        if name not in cells:
            continue
        number, expected = cells[name]["num_samples"], cells[name][part]
        known = found[np.isfinite(found)]
        if not len(known) == len(found) == number or abs(known.mean() - expected) >= 1e-3:
            mean = f" with mean {part} {known.mean():.3f}" if len(known) else ""
            raise Disagreement(
                f"{run.path}/{SAMPLES} has {len(known)} answers on {name}{mean}, but {MATRIX} {number} with "
                f"{expected:.3f}: they do not belong together"
            )


def draws_of(run: RunFolder, rows: RowScores) -> Draws:
    """The figures of a run as they would be with other test rows, which are drawn from those it had.

    Rows of a task are drawn together for all stages, and for all runs that were asked the same ones.
    """
    means: dict[tuple[str, Part], list[list[float]]] = {}
    for (name, part), scores in rows.scores.items():
        key = [zlib.crc32("\n".join([name, *rows.rows[name]]).encode())]
        means[name, part] = resampled_means(scores, NUM_DRAWS, key).tolist()
    assert run.matrix is not None
    found = [{**scores_of(matrix), **_probes(matrix)} for matrix in _drawn(run.matrix, means)]
    return {name: np.array([each[name] for each in found]) for name, value in found[0].items() if value is not None}


def probe_figure(name: str) -> str:
    """What the change of a probe is called among the figures."""
    return f"probe/{name}"


def _probes(matrix: AccuracyMatrix) -> Figures:
    return {probe_figure(name): change for name, change in changes_by_probe(matrix).items()}


def _drawn(matrix: AccuracyMatrix, means: Mapping[tuple[str, Part], list[list[float]]]) -> Iterator[AccuracyMatrix]:
    for draw in range(NUM_DRAWS):
        measured: list[Scores] = [{} for _ in _measured(matrix)]
        for (name, part), values in means.items():
            for cells, value in zip(measured, values[draw], strict=True):
                if not np.isnan(value):
                    cell: Any = cells.setdefault(name, Cell(accuracy=0.0, num_samples=1))
                    cell[part] = value
        zero_shot = measured.pop(0) if matrix.zero_shot else None
        yield replace(matrix, zero_shot=zero_shot, rows=measured)


@dataclass(frozen=True)
class Resampled:
    """Figures of arms over draws of test rows.

    Args:
        arms: For each arm whose runs all kept their answers, the mean of its seeds in each draw.
        unknown: Why the others have no intervals.
    """

    arms: Mapping[str, Draws]
    unknown: Sequence[str]

    @classmethod
    def of(cls, arms: Sequence[Arm]) -> Resampled:
        """Draws for every arm."""
        found: dict[str, Draws] = {}
        unknown: list[str] = []
        for arm in arms:
            try:
                rows = [(run, row_scores(run)) for run in arm.runs.values() if run.num_stages]
            except Disagreement as error:
                unknown.append(f"{arm.name} has no intervals: {error}.")
                continue
            if lacking := [run for run, scores in rows if scores is None]:
                unknown.append(f"{arm.name} has no intervals: {lacking[0].path} keeps no samples.jsonl.")
            elif rows:
                draws = [draws_of(run, scores) for run, scores in rows if scores is not None]
                found[arm.name] = {name: np.mean([each[name] for each in draws], axis=0)
                                   for name in draws[0] if all(name in each for each in draws)}  # fmt: skip
        return cls(found, unknown)

    def interval(self, arm: str, figure: str) -> Interval | None:
        """Of a score of an arm, or of the change of a probe."""
        draws = self.arms.get(arm, {}).get(figure)
        return None if draws is None else percentile_interval(draws, LEVEL)

    def difference(self, arm: str, other: str, figure: str) -> Interval | None:
        """Of what an arm has more than another."""
        one, two = (self.arms.get(name, {}).get(figure) for name in (arm, other))
        return None if one is None or two is None else percentile_interval(one - two, LEVEL)
