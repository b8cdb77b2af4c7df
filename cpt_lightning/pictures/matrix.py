"""The accuracy matrix as a picture of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cpt_lightning.records.matrix import NOT_MEASURED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cpt_lightning.records import AccuracyMatrix
    from cpt_lightning.records.matrix import Scores

CELL = 0.56, 0.32
"""Inches of a cell, width and height."""
INCHES_PER_LETTER = 0.085
GAP = 0.35
"""Between tasks and probes, and between the base and the stages, in cells."""
MAX_LETTERS = 26
"""Of a name that is shown; the rest is dots."""

BELOW, RIGHT = 0.35, 0.9
"""Inches around the cells, to the right at least."""
LIGHT = 0.55
"""From this accuracy on a cell's colour asks for black ink."""

Column = tuple[str, "Scores", Sequence[str]]
"""The name of a stage, what was scored after it, and the tasks that it had taught."""


def heatmap(matrix: AccuracyMatrix) -> Figure:
    """Who scored what, when: a row per task and, below a gap, per probe; a column per stage, after that of the base.

    Accuracies in per cent stand in the cells, a dash where none was measured, for the task or probe came to the stream
    later; a frame marks where a task has just been learned. The colours are told apart without seeing red or green, and
    as greys.

    Args:
        matrix: The record so far.

    Raises:
        ValueError: Nothing has been evaluated yet.
    """
    from matplotlib.figure import Figure  # slow to import

    columns, names = columns_of(matrix), matrix.names
    if not columns:
        raise ValueError("the accuracy matrix is empty: neither the base nor a stage has been evaluated")
    xs = [place + (GAP if place and matrix.zero_shot is not None else 0.0) for place in range(len(columns))]
    ys = [place + (GAP if name in matrix.probes else 0.0) for place, name in enumerate(names)]
    labels = [stage_label(name) for name, _, _ in columns]
    left, top = (INCHES_PER_LETTER * longest(texts) + 0.25 for texts in (map(shortened, names), labels))
    cells = CELL[0] * (xs[-1] + 1), CELL[1] * (ys[-1] + 1)
    right = max(RIGHT, INCHES_PER_LETTER * len(labels[-1]))
    width, height = left + cells[0] + right, BELOW + cells[1] + top * 0.75
    figure = Figure(figsize=(width, height))
    # Places are computed: a constrained layout takes several times as long as the drawing itself.
    axes = figure.add_axes((left / width, BELOW / height, cells[0] / width, cells[1] / height))
    _draw_cells(axes, names, columns, xs, ys)
    axes.set_xticks(xs, labels, rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks(ys, [shortened(name) for name in names])
    axes.set(xlim=(-0.5, xs[-1] + 0.5), ylim=(ys[-1] + 0.5, -0.5))
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.set_frame_on(False)
    figure.text(left / width, 0.1 / height, "accuracy in %; framed: just learned", fontsize=8, color="0.35")
    if matrix.probes:
        middle = (ys[len(matrix.tasks)] + ys[-1]) / 2
        axes.text(xs[-1] + 0.65, middle, "probes", rotation=270, va="center", color="0.4")
    return figure


def _draw_cells(
    axes: Axes, names: Sequence[str], columns: Sequence[Column], xs: Sequence[float], ys: Sequence[float]
) -> None:
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection

    colours, squares, values, frames = colormaps["cividis"], [], [], []
    for x, (_, scores, learned) in zip(xs, columns, strict=True):
        for y, name in zip(ys, names, strict=True):
            if name not in scores:
                axes.text(x, y, NOT_MEASURED, ha="center", va="center", color="0.5", fontsize=9)
                continue
            value, just_learned = scores[name]["accuracy"], name in learned
            ink, weight = "black" if value > LIGHT else "white", "bold" if just_learned else "normal"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=9, weight=weight)
            squares.append(_rectangle(x, y, 0.5, 0.5))
            values.append(value)
            if just_learned:
                frames.append((_rectangle(x, y, 0.43, 0.39), ink))
    axes.add_collection(PolyCollection(squares, facecolors=colours(values), edgecolors="white"))
    if frames:
        corners, inks = zip(*frames, strict=True)
        axes.add_collection(PolyCollection(corners, facecolors="none", edgecolors=inks, linewidths=1.5))


def _rectangle(x: float, y: float, width: float, height: float) -> list[tuple[float, float]]:
    return [(x + i * width, y + j * height) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


def columns_of(matrix: AccuracyMatrix) -> list[Column]:
    """The base, if it was evaluated, and the stages so far."""
    base: list[Column] = [] if matrix.zero_shot is None else [("base", matrix.zero_shot, [])]
    return [*base, *zip(matrix.stage_names, matrix.rows, matrix.stages, strict=False)]


def stage_label(name: str) -> str:
    """The name of a stage as a picture has room for: of a large mixture, how many tasks it has."""
    tasks = name.split("+")
    return shortened(name) if len(tasks) <= 2 else f"{len(tasks)} tasks mixed"


def shortened(name: str) -> str:
    """A name, cut off where it is too long.

    >>> shortened("a_task_with_a_very_long_name_indeed")
    'a_task_with_a_very_long_n…'
    """
    return plain(name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…")


def plain(text: str) -> str:
    r"""Text for matplotlib to draw as it is: dollars make a formula of it, and legends leave out what begins with _.

    >>> plain(r"$\alpha$"), plain("_x")
    ('\\$\\alpha\\$', ' _x')
    """
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def longest(texts: Iterable[str]) -> int:
    """Letters of the longest text."""
    return max(map(len, texts))
