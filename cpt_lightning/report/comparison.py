"""Runs of several arms and seeds side by side: a table for people, one for programs, and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_lightning.records.files import replace_text
from cpt_lightning.report.figures import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = Mapping[str, float | None]

AXES = {
    "forgetting": "forgetting, points (right: more is lost)",
    "probes": "probes, points against the base (left: more is lost)",
}
"""What learning is drawn against."""
DIGITS = {"KL": 2}
"""After the point, where one is too few."""


@dataclass
class Comparison:
    """The figures of runs, by arm and seed.

    Args:
        arms: For each arm the figures of each of its seeds.
    """

    arms: Mapping[str, Mapping[int, Figures]]

    @property
    def columns(self) -> list[str]:
        """The figures that any run has."""
        runs = [figures for seeds in self.arms.values() for figures in seeds.values()]
        return [name for name in FIGURES if any(figures.get(name) is not None for figures in runs)]

    def values(self, arm: str, column: str) -> list[float]:
        """A figure of all seeds of an arm."""
        found = (figures.get(column) for figures in self.arms[arm].values())
        return [value for value in found if value is not None]

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Reads a ``comparison.csv`` that :meth:`save` wrote; figures have four digits after the point there.

        Raises:
            ValueError: Another kind of file.
        """
        arms: dict[str, dict[int, dict[str, float | None]]] = {}
        with Path(path).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if not {"arm", "seed"} <= set(row):
                    raise ValueError(f"{path} has no columns arm and seed: it is no comparison.csv of `cpt study`")
                arm, seed = row.pop("arm"), int(row.pop("seed"))
                figures = {name: float(value) if value else None for name, value in row.items()}
                arms.setdefault(arm, {})[seed] = figures
        return cls(arms)

    def save(self, folder: str | Path, title: str) -> None:
        """Writes ``comparison.md``, ``comparison.csv`` (a line per run) and ``comparison.png``."""
        folder = Path(folder)
        replace_text(folder / "comparison.md", self.markdown(title))
        replace_text(folder / "comparison.csv", self.csv())
        self.draw(folder / "comparison.png", title)

    # -- tables ------------------------------------------------------------------------------------------------------

    def markdown(self, title: str) -> str:
        """A line per arm: means over seeds, and standard deviations where there are several."""
        columns = self.columns
        lines = [f"# {title}", "", "| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
        for arm, seeds in self.arms.items():
            cells = [spread(self.values(arm, column), DIGITS.get(column, 1)) for column in columns]
            lines.append(f"| {arm} | {len(seeds)} | " + " | ".join(cells) + " |")
        meanings = [f"- **{column}**: {FIGURES[column]}." for column in columns]
        return "\n".join([*lines, "", "Mean ± standard deviation over seeds.", "", *meanings]) + "\n"

    def csv(self) -> str:
        """A line per run."""
        columns = self.columns
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["arm", "seed", *columns])
        for arm, seeds in self.arms.items():
            for seed, figures in seeds.items():
                values = (figures.get(column) for column in columns)
                writer.writerow([arm, seed, *("" if value is None else f"{value:.4f}" for value in values)])
        return text.getvalue()

    # -- picture -----------------------------------------------------------------------------------------------------

    def figure(self, title: str) -> Figure | None:
        """Learning against forgetting, and against what became of the probes; nothing where neither was measured."""
        from matplotlib.figure import Figure  # slow to import

        shown = {column: label for column, label in AXES.items() if column in self.columns}
        if not shown:
            return None
        figure = Figure(figsize=(6 * len(shown), 5.5), layout="constrained")
        for axes, (column, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            self._scatter(axes, column, label)
        handles = {
            name: mark for axes in figure.axes for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
        figure.suptitle(title)
        return figure

    def draw(self, path: Path, title: str) -> None:
        """Writes the figure, if there is one."""
        figure = self.figure(title)
        if figure is None:
            return
        part = path.with_name(path.name + ".part")
        figure.savefig(part, dpi=150, format="png")
        part.replace(path)

    def _scatter(self, axes, column: str, label: str) -> None:
        markers = "osD^vP*X<>"
        for number, arm in enumerate(self.arms):
            x, y = self.values(arm, column), self.values(arm, "learning")
            if x and y:
                axes.errorbar(
                    statistics.mean(x), statistics.mean(y), xerr=deviation(x), yerr=deviation(y), label=arm,
                    color=f"C{number % 10}", marker=markers[number // 10 % len(markers)], capsize=2, linestyle="none",
                )  # fmt: skip
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.set(xlabel=label, ylabel="learning, %")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """A mean and its standard deviation, with so many digits after the point.

    >>> spread([1.0, 2.0, 3.0]), spread([2.0]), spread([])
    ('2.0 ± 1.0', '2.0', '')
    """
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {deviation(values):.{digits}f}" if len(values) > 1 else mean


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
