"""The probes of several arms over the stream: what runs lose of what they were never taught."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from cpt_lightning.pictures.comparison import COLOURS, arm_label
from cpt_lightning.pictures.matrix import stage_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cpt_lightning.records import AccuracyMatrix

Part = Literal["accuracy", "forced_accuracy"]

STYLES: dict[Part, tuple[str, str]] = {"accuracy": ("-", ""), "forced_accuracy": ("--", ", forced prefix")}
"""Line and name of what was measured."""

OF_SEEDS = (statistics.mean, min, max)
"""What is shown of several."""


def probe_curves(arms: Mapping[str, Sequence[AccuracyMatrix]]) -> Figure:
    """Mean accuracy over the probes, from the base on after every stage: a line per arm, and a band over its seeds.

    The band goes from the lowest seed to the highest. Dashed, where that was measured: the same with answers that are
    made to begin in the base's style. Of the probes are meant those that the base was asked.

    Args:
        arms: For each arm the matrices of its seeds, all of one stream.

    Raises:
        ValueError: Nothing to draw, a matrix without probes or base, or of another stream; names the arm.
    """
    from matplotlib.figure import Figure  # slow to import

    columns = _columns(arms)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (arm, seeds) in enumerate(arms.items()):
        for part, (line, suffix) in STYLES.items():
            curves = [_means(matrix, part) for matrix in seeds]
            if not all(curves):
                continue
            means, lowest, highest = ([of(values) for values in zip(*curves, strict=True)] for of in OF_SEEDS)
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(means, line, color=colour, label=arm_label(arm) + suffix)
            axes.fill_between(range(len(columns)), lowest, highest, color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks(range(len(columns)), list(map(stage_label, columns)), rotation=30, ha="right")
    axes.set(ylabel="accuracy on the probes, %", ylim=(0, 103))
    axes.grid(axis="x", linewidth=0.4)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def _means(matrix: AccuracyMatrix, part: Part) -> list[float]:
    """The mean over the probes of the base and after each stage, in per cent; empty where it was not measured."""
    probes, scores = matrix.probes_since_base, [matrix.zero_shot or {}, *matrix.rows]
    if not probes or any(part not in row[probe] for row in scores for probe in probes):
        return []
    return [100 * statistics.mean(row[probe][part] for probe in probes) for row in scores]


def _columns(arms: Mapping[str, Sequence[AccuracyMatrix]]) -> list[str]:
    """The base, and the stages that all runs have learned."""
    matrices = [(arm, matrix) for arm, seeds in arms.items() for matrix in seeds]
    if len({arm for arm, _ in matrices}) < max(1, len(arms)):
        raise ValueError("an arm without a run has no probes to draw: give one accuracy matrix or more of each")
    first = matrices[0][1]
    for arm, matrix in matrices:
        if matrix.zero_shot is None or not matrix.probes:
            raise ValueError(f"{arm}: a run without probes, or without scores of the base, has no curve; leave it out")
        if (matrix.probes, matrix.stages, len(matrix.rows)) != (first.probes, first.stages, len(first.rows)):
            raise ValueError(
                f"{arm}: a run with {len(matrix.rows)} of the stages {matrix.stage_names} and the probes "
                f"{matrix.probes} does not go with one with {len(first.rows)} of {first.stage_names} and {first.probes}"
            )
    return ["base", *first.stage_names[: len(first.rows)]]
