"""The accuracy matrix as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cpt_lightning.records import AccuracyMatrix
    from cpt_lightning.records.matrix import Scores

CELL_INCHES = 0.62
"""Of a cell's width; its height is two thirds of that."""


Column = tuple[str, "Scores", Sequence[str]]
"""The name of a stage, what was scored after it, and the tasks that it had taught."""


def heatmap(matrix: AccuracyMatrix) -> Figure:
    """Who scored what, when: a row per task and, below a gap, per probe, a column per stage, beginning with the base.

    Accuracies in per cent stand in the cells; a frame marks where a task has just been learned.
    """
    from matplotlib.figure import Figure  # slow to import

    columns = columns_of(matrix)
    groups = [names for names in (matrix.tasks, matrix.probes) if names]
    heights = [len(names) for names in groups]
    size = 2.2 + CELL_INCHES * len(columns), 1.4 + CELL_INCHES * 2 / 3 * sum(heights)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for axes, names in zip(panels, groups, strict=True):
        _cells(axes, names, columns)
        axes.set_xticks([])
    labels = [name.replace("+", "\n+") for name, _, _ in columns]
    panels[-1].set_xticks(range(len(columns)), labels, rotation=40, ha="right")
    return figure


def columns_of(matrix: AccuracyMatrix) -> list[Column]:
    """The base, if it was evaluated, and the stages so far."""
    base: list[Column] = [] if matrix.zero_shot is None else [("base", matrix.zero_shot, [])]
    return [*base, *zip(matrix.stage_names, matrix.rows, matrix.stages, strict=False)]


def _cells(axes: Axes, names: list[str], columns: list[Column]) -> None:
    from matplotlib.patches import Rectangle

    values = [[100 * scores[name]["accuracy"] for _, scores, _ in columns] for name in names]
    axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(names)), names)
    for y, name in enumerate(names):
        for x, (_, _, learned) in enumerate(columns):
            value = values[y][x]
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="black" if value > 60 else "white")
            if name in learned:
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))


def stream_curves(matrix: AccuracyMatrix) -> Figure:
    """Accuracy of every task, and the mean of the probes, over all stages; a dot where a task has just been learned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    columns = columns_of(matrix)
    for task in matrix.tasks:
        values = [100 * scores[task]["accuracy"] for _, scores, _ in columns]
        taught = [place for place, (_, _, learned) in enumerate(columns) if task in learned]
        axes.plot(values, label=task, marker="o", markevery=taught)
    if matrix.probes:
        totals = (sum(scores[name]["accuracy"] for name in matrix.probes) for _, scores, _ in columns)
        means = [100 * total / len(matrix.probes) for total in totals]
        axes.plot(means, color="grey", linestyle="--", label="probes, mean")
    axes.set(ylabel="accuracy, %", ylim=(0, 103))
    axes.set_xticks(range(len(columns)), [name for name, _, _ in columns], rotation=30, ha="right")
    axes.grid(axis="x", linewidth=0.4)
    figure.legend(loc="outside right center", fontsize=8)
    return figure
