"""What the report says of one arm, and a picture as the page and its files have it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_lightning.pictures import heatmap, stream_curves
from cpt_lightning.pictures.files import save_png, svg
from cpt_lightning.records import AccuracyMatrix
from cpt_lightning.records.files import replace_text
from cpt_lightning.report.arms import Arm
from cpt_lightning.report.comparison import Comparison
from cpt_lightning.report.examples import Changes, changes_of
from cpt_lightning.report.images import show_images
from cpt_lightning.report.matrices import Entry, matrices_of, mean_matrix, table_of

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
        with_images: Whether examples show their images.
    """

    def __init__(self, number: int, arm: Arm, comparison: Comparison, with_images: bool = False) -> None:
        self.number, self.arm, self.comparison, self.with_images = number, arm, comparison, with_images
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
    def table(self) -> tuple[list[str], dict[str, list[Entry | None]]]:
        """Names of the stages, and an entry of each task and probe for each; ``None`` where it was not measured."""
        return table_of(self.matrices)

    @cached_property
    def changes(self) -> list[Changes]:
        """Rows gained and lost by the first seed."""
        found = changes_of(self.arm.first)
        if self.with_images:
            show_images(self.arm.first, found)
        return found

    @cached_property
    def pictures(self) -> list[Picture]:
        """The matrix as files have it, and the curves."""
        if not self.matrices:
            return []
        mean, name = mean_matrix(self.matrices), self.arm.name
        found = [Picture(f"matrix_{self.number}", f"Accuracy matrix of {name}", heatmap(mean))]
        if mean.rows:
            meaning = f"Accuracy of {name} on every task over the stream"
            found.append(Picture(f"curves_{self.number}", meaning, stream_curves(mean)))
        return found
