"""What is lost against the distance from the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpt_lightning.functional.regression import QuadraticFit
from cpt_lightning.pictures.comparison import arm_label, legend_below, legend_inches, styles_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def law(
    points: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    fit: QuadraticFit | None,
    among: Sequence[str] = (),
) -> Figure:
    """A point per run and stage, a colour per arm, and the parabola that was fitted to all of them.

    Args:
        points: By arm, distance and loss.
        labels: Of the two axes.
        fit: With its share of explained variance in the legend.
        among: Arms that other pictures show too, in their order: each looks the same in all.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(5, 4.4 + legend_inches([*points, "quadratic"])), layout="constrained")
    axes = figure.subplots()
    styles = styles_of(points, among)
    for arm, each in points.items():
        x, y = zip(*each, strict=True)
        axes.plot(x, y, label=arm_label(arm), linestyle="none", alpha=0.8, **styles[arm])
    if fit is not None:
        reached = [x for each in points.values() for x, _ in each]
        grid = np.linspace(min(reached), max(reached), 100)
        axes.plot(grid, fit(grid), color="grey", linestyle="--", label=f"quadratic, R² = {fit.r_squared:.2f}")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    legend_below(figure)
    return figure
