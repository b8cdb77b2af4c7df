"""Several arms in one picture."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpt_lightning.functional.pareto import pareto_front
from cpt_lightning.pictures.matrix import columns_of, longest, plain, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cpt_lightning.records import AccuracyMatrix

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart; yellow is left out, for it is lost on white."""
MARKERS = "osD^vP*X<>"
HOLLOW = {"markerfacecolor": "none"}
MOST_TICKS = 9
"""Below the stages of a panel, that of the base aside."""
ARM_LETTERS, LEGEND_LETTERS = 70, 32
"""Of an arm's name that a legend shows at most; of the longest one with which it has two columns."""


@dataclass(frozen=True)
class Point:
    """An arm.

    Args:
        name: For the legend.
        lost: What each of its seeds lost, as the axis has it.
        learned: What each of them learned.
        is_finished: Whether each of them has learned its whole stream.
    """

    name: str
    lost: Sequence[float]
    learned: Sequence[float]
    is_finished: bool = True


@dataclass(frozen=True)
class Panel:
    """What learning is drawn against.

    Args:
        label: Of the axis.
        points: The arms.
        right_is_worse: Whether more is lost to the right.
    """

    label: str
    points: Sequence[Point]
    right_is_worse: bool = True


def style_of(number: int) -> dict[str, Any]:
    """How an arm is drawn, by its number: seventy look different."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def trade_off(panels: Sequence[Panel], title: str = "", among: Sequence[str] = ()) -> Figure:
    """Learning against what was lost: means, and standard deviations over seeds.

    A grey line goes through the arms that no other beats in both, the Pareto front. Arms that are not finished are
    hollow and no part of it: in fewer tasks there is less to forget.

    Args:
        panels: One beside the other.
        title: Above them.
        among: Arms that other pictures show too, in their order: each looks the same in all.
    """
    from matplotlib.figure import Figure  # slow to import

    names = list(dict.fromkeys(point.name for panel in panels for point in panel.points))
    styles = styles_of(names, among)
    figure = Figure(figsize=(5 * len(panels), 4.4 + legend_inches(names)), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _front(axes, panel)
        for point in panel.points:
            axes.errorbar(
                statistics.mean(point.lost), statistics.mean(point.learned), label=arm_label(point.name), capsize=2,
                xerr=_deviation(point.lost), yerr=_deviation(point.learned), linestyle="none",
                **styles[point.name], **({} if point.is_finished else HOLLOW),
            )  # fmt: skip
        if not all(point.is_finished for point in panel.points):
            axes.plot([], [], "o", color="grey", **HOLLOW, label="hollow: not finished")
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.set(xlabel=panel.label, ylabel="learning, %")
    legend_below(figure)
    figure.suptitle(title)
    return figure


def _front(axes: Axes, panel: Panel) -> None:
    finished = [point for point in panel.points if point.is_finished]
    lost = [statistics.mean(point.lost) for point in finished]
    learned = [statistics.mean(point.learned) for point in finished]
    front = pareto_front(learned, lost if panel.right_is_worse else [-value for value in lost])
    if len(front) > 1:
        x, y = [lost[place] for place in front], [learned[place] for place in front]
        axes.plot(x, y, color="silver", linewidth=4, drawstyle="steps-post", alpha=0.6, zorder=0, label="Pareto front")


def styles_of(names: Iterable[str], among: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """How each arm is drawn, by its place among those that several pictures show, and behind these."""
    order = dict.fromkeys([*among, *names])
    return {name: style_of(number) for number, name in enumerate(order)}


def task_curves(arms: Mapping[str, AccuracyMatrix], among: Sequence[str] = ()) -> Figure:
    """A panel per task, and one for the mean of the probes: accuracy over the stages, a line per arm.

    A vertical line marks where the task is learned; arms whose streams have other tasks are drawn where they have it. A
    line begins where its task was measured first, that of the mean of the probes where all of them were.

    Args:
        arms: By name.
        among: As in :func:`trade_off`.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for matrix in arms.values() for task in matrix.tasks))
    names: list[str | None] = [*tasks, *([None] if any(matrix.probes for matrix in arms.values()) else [])]
    width = min(3, len(names))
    height = -(-len(names) // width)
    figure = Figure(figsize=(3.1 * width, 2.3 * height + 0.6 + legend_inches(arms)), layout="constrained")
    panels = list(figure.subplots(height, width, squeeze=False, sharey=True).flat)
    styles = styles_of(arms, among)
    for axes, name in zip(panels, names, strict=False):
        _curves(axes, arms, name, styles)
    for axes in panels[len(names) :]:
        axes.remove()
    for axes in figure.axes[::width]:
        axes.set_ylabel("accuracy, %")
    for axes in figure.axes[-width:]:
        axes.set_xlabel("stage")
    legend_below(figure)
    return figure


def _curves(
    axes: Axes, arms: Mapping[str, AccuracyMatrix], task: str | None, styles: Mapping[str, dict[str, Any]]
) -> None:
    """One panel: a task, or ``None`` for the mean of the probes."""
    for arm, matrix in arms.items():
        shown = matrix.probes if task is None else [task] if task in matrix.tasks else []
        if not shown:
            continue
        columns = [scores for _, scores, _ in columns_of(matrix) if set(shown) <= set(scores)]
        values = [100 * statistics.mean(scores[name]["accuracy"] for name in shown) for scores in columns]
        first = 1 + len(matrix.rows) - len(values)
        axes.plot(range(first, first + len(values)), values, label=arm_label(arm), markersize=4, **styles[arm])
        if task is not None:
            axes.axvline(1 + matrix.learned_at[matrix.tasks.index(task)], color="grey", linewidth=0.6, linestyle=":")
    num_stages = max(len(matrix.stages) for matrix in arms.values())
    places = range(0, num_stages + 1, 1 + num_stages // MOST_TICKS)
    axes.set_xticks(places, [str(place) if place else "base" for place in places])
    axes.set(title="probes, mean" if task is None else shortened(task), ylim=(-3, 103))


def legend_below(figure: Figure) -> None:
    """One for all panels: a phone has no room beside them."""
    marks = {name: mark for axes in figure.axes for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = _legend_columns(marks)
    figure.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=columns, fontsize=8)


def legend_inches(names: Collection[str]) -> float:
    """How high the legend of these will be."""
    return 0.22 * -(-len(names) // _legend_columns(names))


def _legend_columns(names: Collection[str]) -> int:
    return 2 if longest(names) <= LEGEND_LETTERS else 1


def arm_label(name: str) -> str:
    """The name of an arm as a legend has room for: the end of a long one, in which folders differ.

    >>> arm_label("runs/" * 20 + "sft")
    '…/runs/runs/runs/runs/runs/runs/runs/runs/runs/runs/runs/runs/runs/sft'
    """
    return plain(name if len(name) <= ARM_LETTERS else f"…{name[1 - ARM_LETTERS :]}")


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
