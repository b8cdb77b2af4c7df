"""The report of some runs: one page for the browser, and the same as Markdown, CSV, LaTeX and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from cpt_lightning.pictures.comparison import task_curves, trade_off
from cpt_lightning.pictures.law import law
from cpt_lightning.records.files import replace_text
from cpt_lightning.report.arms import Arm
from cpt_lightning.report.cautions import cautions
from cpt_lightning.report.comparison import Comparison, bounds, number
from cpt_lightning.report.figures import FIGURES, SCORES, changes_by_probe, figures_of
from cpt_lightning.report.filters import filtered
from cpt_lightning.report.intervals import NUM_DRAWS, Interval, Resampled, probe_figure
from cpt_lightning.report.law import Law, laws_of
from cpt_lightning.report.matrices import matrices_csv, mean_matrix
from cpt_lightning.report.section import Picture, Section
from cpt_lightning.report.settings import differing_circumstances, differing_options
from cpt_lightning.report.templates import render

Difference = tuple[str, str, bool]
"""Points, their interval, and whether that leaves out 0."""


class Report:
    """Some runs, compared.

    Args:
        arms: What is compared; the first is what the others are held against.
        title: Heading.
        with_images: Whether examples show their images, which are taken from the data that the configurations name.
    """

    def __init__(self, arms: Sequence[Arm], title: str = "Report", with_images: bool = False) -> None:
        self.arms, self.title = arms, title
        self.resampled = Resampled.of(arms)
        self.comparison = Comparison(
            {arm.name: {seed: figures_of(run) for seed, run in arm.runs.items()} for arm in arms},
            {name: {figure: interval for figure in draws if (interval := self.resampled.interval(name, figure))}
             for name, draws in self.resampled.arms.items()},
            [arm.name for arm in arms if arm.unfinished],
        )  # fmt: skip
        self.cautions = [*cautions(arms), *self.resampled.unknown]
        self.options = differing_options(arms)
        self.circumstances = differing_circumstances(arms)
        self.filtered = list(filtered(arms))
        self.sections = [Section(number, arm, self.comparison, with_images)
                         for number, arm in enumerate(arms, start=1)]  # fmt: skip

    # -- what the templates ask for ------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Of the arms."""
        return [arm.name for arm in self.arms]

    @property
    def meanings(self) -> dict[str, str]:
        """What the figures are."""
        return FIGURES

    @property
    def num_draws(self) -> int:
        """Of test rows, for the intervals."""
        return NUM_DRAWS

    @property
    def differences(self) -> dict[str, list[Difference]]:
        """By arm, what it has more than the first arm of each score."""
        first, *others = self.names
        return {other: [self._more(other, first, name) for name in self.compared] for other in others}

    def _more(self, arm: str, first: str, figure: str) -> Difference:
        one, two = self.comparison.mean(arm, figure), self.comparison.mean(first, figure)
        more = None if one is None or two is None else one - two
        return _difference(more, self.resampled.difference(arm, first, figure))

    @cached_property
    def probes(self) -> list[str]:
        """All that any arm has."""
        return list(
            dict.fromkeys(probe for each in self.sections for matrix in each.matrices for probe in matrix.probes)
        )

    @property
    def probe_changes(self) -> dict[str, list[Difference]]:
        """By arm, the change of each probe since the base."""
        found = {}
        for section in self.sections:
            changes = changes_by_probe(mean_matrix(section.matrices)) if section.matrices else {}
            if changes:
                found[section.arm.name] = [
                    _difference(changes.get(probe), self.resampled.interval(section.arm.name, probe_figure(probe)))
                    for probe in self.probes
                ]
        return found

    @property
    def compared(self) -> list[str]:
        """Scores that are held against the first arm's."""
        return [name for name in self.comparison.columns if name in SCORES]

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
            if len(panel.points) < 2:  # one alone lies nowhere in particular
                continue
            yield Picture(f"learning_{what}", f"Learning against {what}", trade_off([panel], among=self.names))
        if len(scored := [section for section in self.sections if section.matrices]) > 1:
            curves = task_curves({each.arm.name: mean_matrix(each.matrices) for each in scored}, self.names)
            meaning = "Accuracy on every task over the stages, a line per arm; dotted: where the task is learned"
            yield Picture("tasks", meaning, curves, is_wide=True)

    @cached_property
    def law_pictures(self) -> list[Picture]:
        """Losses against distances from the base."""
        return [
            Picture(
                f"law_{each.distance}_{each.loss}",
                _described(each),
                law(each.points, each.labels, each.fit, self.names),
            )
            for each in self.laws
        ]

    @cached_property
    def laws(self) -> list[Law]:
        """Every loss against every distance that was measured."""
        return laws_of(self.arms)

    @property
    def fits(self) -> list[tuple[str, str, int, str]]:
        """Of each: what is lost, against which distance, number of points, and R² of a parabola."""
        return [
            (loss, distance, each.num_points, number(each.fit.r_squared, 2) if each.fit else "too few for a fit")
            for each in self.laws
            for distance, loss in [each.labels]
        ]

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


def _difference(points: float | None, interval: Interval | None) -> Difference:
    shown = "" if points is None else number(points, sign="+")
    return shown, bounds(interval), interval is not None and not interval[0] <= 0 <= interval[1]


def _described(law: Law) -> str:
    distance, loss = law.labels
    fit = (
        "too few for a fit" if law.fit is None else f"a parabola explains {law.fit.r_squared:.2f} of the variance (R²)"
    )
    return f"{loss.capitalize()}, against {distance}: {law.num_points} runs and stages, {fit}"
