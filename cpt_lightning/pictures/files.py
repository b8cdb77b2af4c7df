"""Figures as files and as bytes, the same ones each time that they are drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes a picture for the screen; a reader never sees half of it."""
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, format="png")
    part.replace(path)


def svg(figure: Figure) -> bytes:
    """A picture that stays sharp at any size."""
    import matplotlib as mpl  # slow to import

    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "cpt"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
