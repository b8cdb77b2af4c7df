"""The figures of several arms and seeds side by side, as tables for people, papers and programs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_lightning.pictures.comparison import Panel, Point, trade_off
from cpt_lightning.pictures.files import save_png
from cpt_lightning.records.files import replace_text
from cpt_lightning.records.markdown import markdown_cell
from cpt_lightning.report.figures import COSTS, FIGURES, Figures
from cpt_lightning.report.updates import UPDATES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {
    "forgetting": ("forgetting, points (right: more is lost)", True),
    "probes": ("probes, points against the base (left: more is lost)", False),
}
"""What learning is drawn against, and whether more is lost to the right."""
DIGITS = {"KL": 2, "rows": 2, "rollouts": 2, "GPU memory": 2, "host memory": 2}
"""After the point, where one is too few."""


@dataclass
class Comparison:
    """The figures of runs, by arm and seed.

    Args:
        arms: For each arm the figures of each of its seeds.
        intervals: For each arm those of its means, by figure, where they are known.
        unfinished: Arms with a seed that has not learned its whole stream.
    """

    arms: Mapping[str, Mapping[int | str, Figures]]
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    unfinished: Collection[str] = ()

    @property
    def columns(self) -> list[str]:
        """The figures that any run has."""
        runs = [figures for seeds in self.arms.values() for figures in seeds.values()]
        return [name for name in FIGURES if any(figures.get(name) is not None for figures in runs)]

    @property
    def scores(self) -> list[str]:
        """Figures of what was learned and lost."""
        return [name for name in self.columns if name not in {*UPDATES, *COSTS}]

    @property
    def updates(self) -> list[str]:
        """Figures of what updates did on the way."""
        return [name for name in self.columns if name in UPDATES]

    @property
    def costs(self) -> list[str]:
        """Figures of what that took."""
        return [name for name in self.columns if name in COSTS]

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
        arms: dict[str, dict[int | str, Figures]] = {}
        with Path(path).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if not {"arm", "seed"} <= set(row):
                    raise ValueError(f"{path} has no columns arm and seed: it is no comparison.csv of `cpt study`")
                arm, seed = row.pop("arm"), row.pop("seed")
                figures = {name: float(value) if value else None for name, value in row.items()}
                arms.setdefault(arm, {})[int(seed) if seed.isdecimal() else seed] = figures
        return cls(arms)

    def mean(self, arm: str, column: str) -> float | None:
        """A figure of an arm, averaged over its seeds."""
        values = self.values(arm, column)
        return statistics.mean(values) if values else None

    def cell(self, arm: str, column: str) -> tuple[str, str]:
        """The mean with its spread over seeds, and the interval of the mean; empty where not known."""
        digits = DIGITS.get(column, 1)
        interval = self.intervals.get(arm, {}).get(column)
        return spread(self.values(arm, column), digits), bounds(interval, digits)

    def save(self, folder: str | Path, title: str) -> None:
        """Writes ``comparison.md``, ``.csv`` (a line per run), ``.tex`` and ``.png``."""
        folder = Path(folder)
        replace_text(folder / "comparison.md", self.markdown(title))
        replace_text(folder / "comparison.csv", self.csv())
        replace_text(folder / "comparison.tex", self.latex())
        if (figure := self.figure(title)) is not None:
            save_png(figure, folder / "comparison.png")

    # -- tables ------------------------------------------------------------------------------------------------------

    def markdown(self, title: str) -> str:
        """A line per arm under a heading, and what the figures are."""
        meanings = [f"- **{column}**: {FIGURES[column]}." for column in self.columns]
        return "\n".join([f"# {title}", "", self.markdown_table(), "", self.legend, "", *meanings]) + "\n"

    def markdown_table(self, columns: Sequence[str] | None = None) -> str:
        """A line per arm."""
        columns = self.columns if columns is None else columns
        lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
        for arm, seeds in self.arms.items():
            cells = [" ".join(filter(None, self.cell(arm, column))) for column in columns]
            lines.append(f"| {markdown_cell(arm)} | {len(seeds)} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    @property
    def legend(self) -> str:
        """What stands in a cell."""
        has_spread = any(len(seeds) > 1 for seeds in self.arms.values())
        said = ["mean ± standard deviation over seeds" if has_spread else "one seed an arm"]
        said += ["in brackets the 95 % interval of the mean over test rows"] if self.intervals else []
        return f"{'; '.join(said).capitalize()}."

    def csv(self) -> str:
        """A line per run."""
        columns = self.columns
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["arm", "seed", *columns])
        for arm, seeds in self.arms.items():
            for seed, figures in seeds.items():
                values = (figures.get(column) for column in columns)
                writer.writerow([arm, seed, *("" if value is None else number(value, 4) for value in values)])
        return text.getvalue()

    def latex(self) -> str:
        """Scores, updates and costs, a table each with a line per arm, for the package booktabs."""
        groups = self.scores, self.updates, self.costs
        head = [r"% \usepackage{booktabs}", f"% {self.legend}", ""]
        return "\n".join([*head, *(self._tabular(columns) for columns in groups if columns)])

    def _tabular(self, columns: Sequence[str]) -> str:
        lines = [r"\begin{tabular}{l" + "r" * (len(columns) + 1) + "}", r"\toprule"]
        lines += [" & ".join(map(latex_text, ["arm", "seeds", *columns])) + r" \\", r"\midrule"]
        for arm, seeds in self.arms.items():
            cells = [_latex_cell(*self.cell(arm, column)) for column in columns]
            lines.append(" & ".join([latex_text(arm), str(len(seeds)), *cells]) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    # -- picture -----------------------------------------------------------------------------------------------------

    def figure(self, title: str) -> Figure | None:
        """Learning against forgetting, and against what became of the probes; nothing where neither was measured."""
        panels = list(self.panels.values())
        return trade_off(panels, title) if panels else None

    @property
    def panels(self) -> dict[str, Panel]:
        """By figure, where each arm lies: learning, and what was lost."""
        found = {}
        for column, (label, right_is_worse) in AXES.items():
            points = [
                Point(arm, self.values(arm, column), self.values(arm, "learning"), arm not in self.unfinished)
                for arm in self.arms
            ]
            if known := [point for point in points if point.lost and point.learned]:
                found[column] = Panel(label, known, right_is_worse)
        return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """A mean and its standard deviation, with so many digits after the point.

    >>> spread([1.0, 2.0, 3.0]), spread([2.0]), spread([])
    ('2.0 ± 1.0', '2.0', '')
    """
    if not values:
        return ""
    mean = number(statistics.mean(values), digits)
    return f"{mean} ± {number(statistics.stdev(values), digits)}" if len(values) > 1 else mean


def bounds(interval: tuple[float, float] | None, digits: int = 1) -> str:
    """An interval in brackets.

    >>> bounds((-1.04, 2.0)), bounds(None)
    ('[-1.0, 2.0]', '')
    """
    return "" if interval is None else f"[{number(interval[0], digits)}, {number(interval[1], digits)}]"


def number(value: float, digits: int = 1, sign: str = "-") -> str:
    """A number, and no minus before a zero.

    >>> number(-0.04), number(-0.06), number(1.234, 2), number(1.0, sign="+")
    ('0.0', '-0.1', '1.23', '+1.0')
    """
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def latex_text(text: str) -> str:
    r"""Text as LaTeX prints it.

    >>> latex_text("lr_1e-3 & 50 %"), latex_text("<|>")
    ('lr\\_1e-3 \\& 50 \\%', '\\textless{}\\textbar{}\\textgreater{}')
    """
    special = {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
        "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    }  # fmt: skip
    return "".join(special.get(letter, rf"\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def _latex_cell(mean: str, interval: str) -> str:
    small = rf" {{\scriptsize {interval}}}" if interval else ""
    return latex_text(mean).replace("-", "$-$") + small.replace("-", "$-$")
