"""Pictures of a study of methods and learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from claims import Point, learning_rates, values_of
from matplotlib.figure import Figure

from cpt_lightning.pictures.comparison import legend_below, style_of

LOSSES = {"probes": "probes, points", "probes, forced": "probes in the base's forced style, points"}


def frontier(points: Sequence[Point]) -> Figure:
    """Learning against what the probes lost: a line per method through its learning rates, means over seeds."""
    methods = list(dict.fromkeys(point.method for point in points))
    figure = Figure(figsize=(5 * len(LOSSES), 4.4 + 0.22 * -(-len(methods) // 2)), layout="constrained")
    for axes, (figure_name, label) in zip(figure.subplots(1, len(LOSSES)), LOSSES.items(), strict=True):
        for number, method in enumerate(methods):
            rates = learning_rates(points, method)
            x, y = (
                [statistics.mean(values_of(points, name, method, lr).values()) for lr in rates]
                for name in (figure_name, "learning")
            )
            axes.plot(x, y, label=method, alpha=0.8, **style_of(number))
            axes.annotate(rates[-1], (x[-1], y[-1]), fontsize=6, color="grey")
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.set(xlabel=f"{label} (left: more is lost)", ylabel="learning, %")
    legend_below(figure)
    return figure


def predictors(points: Sequence[Point], labels: Mapping[str, str]) -> Figure:
    """What the probes lost against each figure: a point per run."""
    methods = list(dict.fromkeys(point.method for point in points))
    height = -(-len(labels) // 3)
    figure = Figure(figsize=(13, 3.6 * height + 0.8), layout="constrained")
    panels = list(figure.subplots(height, 3, squeeze=False).flat)
    for axes, (name, label) in zip(panels, labels.items(), strict=False):
        for number, method in enumerate(methods):
            mine = [point.figures for point in points if point.method == method]
            x, y = ([figures[each] for figures in mine] for each in (name, "lost"))
            axes.plot(x, y, label=method, linestyle="none", alpha=0.7, **style_of(number))
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel("lost on probes, points", fontsize=8)
        if not name.startswith("log_") and name != "influence":
            axes.set_xscale("log")
    for axes in panels[len(labels) :]:
        axes.remove()
    legend_below(figure)
    return figure
