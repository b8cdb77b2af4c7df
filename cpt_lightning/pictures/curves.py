"""The course of a stream: what was learned and forgotten, task by task, along one axis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from cpt_lightning.pictures.matrix import INCHES_PER_LETTER, columns_of, longest, shortened, stage_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cpt_lightning.records import AccuracyMatrix

BAND = 0.46
"""Inches from one task's band to the next."""
HEIGHT = 0.8
"""Of a band from 0 to 100 per cent, as a share of that."""
GAP = 0.7
"""Between tasks and probes, in bands."""
STAGE_INCHES = 0.85, 5.0
"""Width of a stage, and of all of them at least."""

BELOW, RIGHT = 0.75, 1.1
"""Inches around the bands, to the right at least."""
CAPTION = "bands: 0 to 100 %; blue ground: taught here; filled: below its best since; at the end: accuracy, points lost"

TAUGHT, KEPT, LOST, FAINT = "#d9e6f2", "#0072b2", "#d55e00", "#8a8a8a"
"""Okabe and Ito's blue and vermilion, which are told apart without seeing red or green."""


def stream_curves(matrix: AccuracyMatrix, steps: Sequence[int] | None = None) -> Figure:
    """Learning and forgetting along the stream: a band per task and probe, from 0 to 100 %, over one axis of steps.

    Blue ground marks the stages that teach the task; before them its line is grey. What it has fallen below its best
    since then is filled in vermilion (a probe's best counts from the base on), and written at the end in points. A line
    begins where its task or probe was measured first.

    Args:
        matrix: The record so far.
        steps: Step at the end of each stage so far; without them stages are drawn equally long.

    Raises:
        ValueError: No stage has been learned yet, or there is not a step for each.
    """
    from matplotlib.figure import Figure  # slow to import

    if not matrix.rows:
        raise ValueError("there are no curves before the first stage has been learned")
    if steps is not None and len(steps) != len(matrix.rows):
        raise ValueError(
            f"steps has {len(steps)} numbers for {len(matrix.rows)} stages; give the step at each one's end"
        )
    names = matrix.names
    ends = list(steps) if steps is not None else list(range(1, len(matrix.rows) + 1))
    tops = [place + (GAP if name in matrix.probes else 0.0) for place, name in enumerate(names)]
    labels = [stage_label(name) for name in matrix.stage_names[: len(ends)]]
    left = INCHES_PER_LETTER * longest(map(shortened, names)) + 0.3
    above = 0.3 + 0.5 * INCHES_PER_LETTER * longest(labels)
    inches = max(STAGE_INCHES[0] * len(ends), STAGE_INCHES[1]), BAND * (tops[-1] + 1.2)
    right = max(RIGHT, INCHES_PER_LETTER * len(labels[-1]))
    width, height = left + inches[0] + right, BELOW + inches[1] + above
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, BELOW / height, inches[0] / width, inches[1] / height))
    axes.set(xlim=(0, ends[-1]), ylim=(tops[-1] + 1, -0.2), xlabel="step" if steps is not None else "stage")
    for name, top in zip(names, tops, strict=True):
        _draw_band(axes, matrix, name, top, ends)
    _draw_stages(axes, labels, ends)
    if steps is None:
        axes.set_xticks(ends)
    axes.set_yticks([top + HEIGHT / 2 for top in tops], [shortened(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "left", "right"]].set_visible(False)
    if matrix.probes:
        axes.text(0, tops[len(matrix.tasks)] - 0.12, "probes", fontsize=8, style="italic", color=FAINT)
    figure.text(left / width, 0.1 / height, CAPTION, fontsize=8, color="0.35")
    return figure


def _draw_band(axes: Axes, matrix: AccuracyMatrix, name: str, top: float, ends: Sequence[int]) -> None:
    """One task's curve, from 100 % at ``top`` down to 0."""
    columns, starts = [column for column in columns_of(matrix) if name in column[1]], [0, *ends]
    if not columns:
        return
    xs = starts[len(starts) - len(columns) :]
    accuracy = [scores[name]["accuracy"] for _, scores, _ in columns]
    ys = [_height(top, value) for value in accuracy]
    for stage in (stage for stage, tasks in enumerate(matrix.stages[: len(ends)]) if name in tasks):
        axes.fill_between(starts[stage : stage + 2], top, top + HEIGHT, color=TAUGHT, linewidth=0)
    axes.hlines([top, top + HEIGHT], 0, ends[-1], color="#e0e0e0", linewidth=0.6)
    axes.plot(xs, ys, color=FAINT, linewidth=1.2)
    known = next((place for place, column in enumerate(columns) if name in column[2] or name in matrix.probes), None)
    if known is None:
        _at_the_end(axes, f"{100 * accuracy[-1]:.0f}", ys[-1], FAINT)
        return
    best = [_height(top, value) for value in accumulate(accuracy[known:], max)]
    axes.fill_between(xs[known:], best, ys[known:], color=LOST, alpha=0.45, linewidth=0)
    learned = max(known - 1, 0)
    axes.plot(xs[learned:], ys[learned:], color=KEPT, linewidth=1.8)
    axes.plot(xs[known:], ys[known:], color=KEPT, marker="o", markersize=3.5, linestyle="", clip_on=False, zorder=3)
    lost = 100 * (max(accuracy[known:]) - accuracy[-1])
    _at_the_end(axes, f"{100 * accuracy[-1]:.0f}", top + HEIGHT / 2, "black")
    if lost >= 0.5:
        _at_the_end(axes, f"\N{MINUS SIGN}{lost:.0f}", top + HEIGHT / 2, LOST, points=32)


def _height(top: float, accuracy: float) -> float:
    return top + HEIGHT * (1 - accuracy)


def _at_the_end(axes: Axes, text: str, y: float, colour: str, points: float = 8) -> None:
    axes.annotate(
        text, (1, y), (points, 0), axes.get_yaxis_transform(), textcoords="offset points", va="center", color=colour
    )


def _draw_stages(axes: Axes, labels: Sequence[str], ends: Sequence[int]) -> None:
    """Lines where a stage ends, and names above."""
    starts = [0, *ends]
    for end in ends[:-1]:
        axes.axvline(end, color="0.45", linewidth=0.7, linestyle=(0, (2, 2)))
    for label, begin, end in zip(labels, starts, ends, strict=False):
        place = (begin + (end - begin) * 0.4, 1.0)
        axes.annotate(
            label, place, (0, 3), axes.get_xaxis_transform(), "offset points",
            rotation=30, ha="left", rotation_mode="anchor", fontsize=9,
        )  # fmt: skip
