"""Pictures of a study of methods and learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from claims import Point, learning_rates, values_of
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from cpt_lightning.pictures.comparison import legend_below, style_of

LOSSES = {"probes": "probes, points", "probes, forced": "probes in the base's forced style, points"}


def frontier(points: Sequence[Point]) -> Figure:
    """Learning against what the probes lost: a line per method through its learning rates, means over seeds.

    Beyond five points what is lost is drawn by its logarithm.
    """
    styles = _styles(points)
    all_rates = sorted({point.lr for point in points}, key=float)
    sizes = {lr: 4 * 1.5**number for number, lr in enumerate(all_rates)}
    figure = Figure(figsize=(5 * len(LOSSES), 4.4 + 0.22 * -(-len(styles) // 2)), layout="constrained")
    for axes, (figure_name, label) in zip(figure.subplots(1, len(LOSSES)), LOSSES.items(), strict=True):
        for method, style in styles.items():
            rates = learning_rates(points, method)
            x, y = (
                [statistics.mean(values_of(points, name, method, lr).values()) for lr in rates]
                for name in (figure_name, "learning")
            )
            axes.plot(x, y, alpha=0.8, **{**style, "marker": ""}, zorder=1)
            axes.scatter(
                x, y, [sizes[lr] ** 2 for lr in rates], marker=style["marker"], edgecolors=style["color"],
                facecolors=style["markerfacecolor"], alpha=0.8, label=method,
            )  # fmt: skip
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.set_xscale("symlog", linthresh=5, linscale=1.5)
        axes.set(xlabel=f"{label} (left: more is lost)", ylabel="learning, %", xlim=(-100, 2))
        axes.set_xticks(ticks := [-100, -50, -20, -10, -5, -3, -2, -1, 0, 1], [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    figure.suptitle(f"larger: higher learning rate ({', '.join(all_rates)})", fontsize=9)
    legend_below(figure)
    return figure


def predictors(points: Sequence[Point], labels: Mapping[str, str]) -> Figure:
    """What the probes lost against each figure: a point per run."""
    height = -(-len(labels) // 3)
    figure = Figure(figsize=(13, 3.6 * height + 0.8), layout="constrained")
    panels = list(figure.subplots(height, 3, squeeze=False).flat)
    for axes, (name, label) in zip(panels, labels.items(), strict=False):
        for method, style in _styles(points).items():
            mine = [point.figures for point in points if point.method == method]
            x, y = ([figures[each] for figures in mine] for each in (name, "lost"))
            axes.plot(x, y, label=method, alpha=0.7, **{**style, "linestyle": "none"})
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel("lost on probes, points", fontsize=8)
        if not name.startswith("log_") and name != "influence":
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in panels[len(labels) :]:
        axes.remove()
    legend_below(figure)
    return figure


def _styles(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Of each method; one with KL looks as it does without, but hollow and dashed."""
    methods = dict.fromkeys(point.method for point in points)
    plain = {method: style_of(number) for number, method in enumerate(m for m in methods if not m.endswith("_kl"))}
    styles = {}
    for method in methods:
        style = plain[method.removesuffix("_kl")]
        hollow = method not in plain
        styles[method] = {
            **style,
            "linestyle": "--" if hollow else "-",
            "markerfacecolor": "white" if hollow else style["color"],
        }
    return styles
