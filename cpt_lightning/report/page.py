"""The report of some runs: one page for the browser, and the same as Markdown, CSV, LaTeX and pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_lightning.pictures import heatmap, stream_curves
from cpt_lightning.pictures.comparison import task_curves, trade_off
from cpt_lightning.pictures.files import save_png, svg
from cpt_lightning.pictures.law import law
from cpt_lightning.records import AccuracyMatrix
from cpt_lightning.records.files import replace_text
from cpt_lightning.report.arms import Arm
from cpt_lightning.report.cautions import cautions
from cpt_lightning.report.comparison import Comparison, bounds, number
from cpt_lightning.report.examples import Changes, changes_of
from cpt_lightning.report.figures import COSTS, FIGURES, SCORES, figures_of
from cpt_lightning.report.filters import filtered
from cpt_lightning.report.intervals import NUM_DRAWS, Resampled
from cpt_lightning.report.law import Law, laws_of
from cpt_lightning.report.matrices import Entry, matrices_csv, matrices_of, mean_matrix, table_of
from cpt_lightning.report.settings import differing_circumstances, differing_options
from cpt_lightning.report.templates import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A drawing, in the page and as files.

    Args:
        name: Of its files.
        meaning: What it shows, for those who cannot see it.
        figure: The drawing.
        is_wide: Whether it needs the whole width of the page.
    """

    name: str
    meaning: str
    figure: Figure
    is_wide: bool = False

    @cached_property
    def svg(self) -> bytes:
        """As the page has it."""
        return svg(self.figure)

    @property
    def source(self) -> str:
        """The picture itself as an address: the page refers to no file."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()

    def save(self, folder: Path) -> None:
        """Writes both files."""
        folder.mkdir(parents=True, exist_ok=True)
        save_png(self.figure, folder / f"{self.name}.png")
        replace_text(folder / f"{self.name}.svg", self.svg.decode())


class Section:
    """What the report says of an arm alone.

    Args:
        number: Of the arm.
        arm: The arm.
        comparison: Of all arms.
    """

    def __init__(self, number: int, arm: Arm, comparison: Comparison) -> None:
        self.number, self.arm, self.comparison = number, arm, comparison
        self.matrices: list[AccuracyMatrix] = matrices_of(arm)

    @property
    def sentence(self) -> str:
        """What it learned, and what it lost."""
        learned, end, lost, dip, probes = (
            self.comparison.mean(self.arm.name, figure)
            for figure in ("learning", "AvgAcc", "forgetting", "worst dip", "probes")
        )
        if learned is None or end is None:
            return "has not learned a task yet."
        now = "in the end" if self.arm.first.is_finished else "so far"
        said = f"stood at {learned:.1f} % when each task had just been learned, and stands at {end:.1f} % {now}"
        if lost is not None and dip is not None:
            change = f"{lost:.1f} points below" if lost >= 0 else f"{-lost:.1f} points above"
            said += f"; earlier tasks are {change} their best ({dip:.1f} below in the worst dip)"
        if probes is not None:
            said += f"; probes changed by {probes:+.1f} points {self.comparison.cell(self.arm.name, 'probes')[1]}"
        return said.rstrip() + "."

    @property
    def table(self) -> tuple[list[str], dict[str, list[Entry]]]:
        """Names of the stages, and an entry of each task and probe for each."""
        return table_of(self.matrices)

    @cached_property
    def changes(self) -> list[Changes]:
        """Rows gained and lost by the first seed."""
        return changes_of(self.arm.first)

    @cached_property
    def pictures(self) -> list[Picture]:
        """The matrix as files have it, and the curves."""
        if not self.matrices:
            return []
        mean, name = mean_matrix(self.matrices), self.arm.name
        return [
            Picture(f"matrix_{self.number}", f"Accuracy matrix of {name}", heatmap(mean)),
            Picture(f"curves_{self.number}", f"Accuracy of {name} on every task over the stream", stream_curves(mean)),
        ]


class Report:
    """Some runs, compared.

    Args:
        arms: What is compared; the first is what the others are held against.
        title: Heading.
    """

    def __init__(self, arms: Sequence[Arm], title: str = "Report") -> None:
        self.arms, self.title = arms, title
        self.resampled = Resampled.of(arms)
        self.comparison = Comparison(
            {arm.name: {seed: figures_of(run) for seed, run in arm.runs.items()} for arm in arms},
            {name: {figure: interval for figure in draws if (interval := self.resampled.interval(name, figure))}
             for name, draws in self.resampled.arms.items()},
        )  # fmt: skip
        self.cautions = [*cautions(arms), *self.resampled.unknown]
        self.options = differing_options(arms)
        self.circumstances = differing_circumstances(arms)
        self.filtered = list(filtered(arms))
        self.sections = [Section(number, arm, self.comparison) for number, arm in enumerate(arms, start=1)]

    # -- what the templates ask for ------------------------------------------------------------------------------------

    @property
    def scores(self) -> list[str]:
        """Figures of what was learned and lost."""
        return [name for name in self.comparison.columns if name not in COSTS]

    @property
    def costs(self) -> list[str]:
        """Figures of what that took."""
        return [name for name in self.comparison.columns if name in COSTS]

    @property
    def meanings(self) -> dict[str, str]:
        """What the figures are."""
        return FIGURES

    @property
    def num_draws(self) -> int:
        """Of test rows, for the intervals."""
        return NUM_DRAWS

    @property
    def differences(self) -> dict[str, list[tuple[str, str, bool]]]:
        """By arm, for each score what it has more than the first arm, the interval, and whether that leaves out 0."""
        first, *others = [arm.name for arm in self.arms]
        return {other: [self._difference(other, first, name) for name in self.compared] for other in others}

    @property
    def compared(self) -> list[str]:
        """Scores that are held against the first arm's."""
        return [name for name in self.comparison.columns if name in SCORES]

    def _difference(self, arm: str, first: str, figure: str) -> tuple[str, str, bool]:
        one, two = self.comparison.mean(arm, figure), self.comparison.mean(first, figure)
        interval = self.resampled.difference(arm, first, figure)
        shown = "" if one is None or two is None else number(one - two, sign="+")
        return shown, bounds(interval), interval is not None and not interval[0] <= 0 <= interval[1]

    @property
    def fingerprints(self) -> dict[str, list[str]]:
        """By task and probe, those of every arm."""
        prints = [arm.first.matrix.fingerprints if arm.first.matrix else {} for arm in self.arms]
        return {name: [each.get(name, "") for each in prints] for name in dict.fromkeys(n for p in prints for n in p)}

    @cached_property
    def pictures(self) -> list[Picture]:
        """Those of all arms together."""
        return list(self._pictures())

    def _pictures(self) -> Iterator[Picture]:
        for what, panel in self.comparison.panels.items():
            yield Picture(f"learning_{what}", f"Learning against {what}", trade_off([panel]))
        if len(scored := [section for section in self.sections if section.matrices]) > 1:
            curves = task_curves({section.arm.name: mean_matrix(section.matrices) for section in scored})
            yield Picture("tasks", "Accuracy on every task over the stream, a line per arm", curves, is_wide=True)

    @cached_property
    def law_pictures(self) -> list[Picture]:
        """Losses against distances from the base."""
        return [
            Picture(f"law_{each.distance.partition('_')[0]}_{each.loss}", _described(each),
                    law(each.points, each.labels, each.fit))
            for each in laws_of(self.arms)
        ]  # fmt: skip

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> list[Path]:
        """Writes the page, ``.md``, ``.csv``, ``.tex`` of the same name, and a folder of pictures and matrices.

        Args:
            path: Of the page.

        Returns:
            What was written.
        """
        path = Path(path)
        files = path.with_name(f"{path.stem}_files")
        for picture in (
            *self.pictures,
            *self.law_pictures,
            *(each for section in self.sections for each in section.pictures),
        ):
            picture.save(files)
        replace_text(files / "matrices.csv", matrices_csv(self.arms))
        replace_text(path.with_suffix(".csv"), self.comparison.csv())
        replace_text(path.with_suffix(".tex"), self.comparison.latex())
        replace_text(path.with_suffix(".md"), render("report.md.j2", report=self, files=files.name))
        replace_text(path, render("report.html.j2", report=self))
        return [path, *(path.with_suffix(suffix) for suffix in (".md", ".csv", ".tex")), files]


def _described(law: Law) -> str:
    distance, loss = law.labels
    fit = (
        "too few for a fit" if law.fit is None else f"a parabola explains {law.fit.r_squared:.2f} of the variance (R²)"
    )
    return f"{loss.capitalize()}, against {distance}: {law.num_points} runs and stages, {fit}"
