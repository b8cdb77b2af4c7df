"""Finished runs, compared: what each learned, lost and cost."""

from cpt_lightning.report.comparison import Comparison
from cpt_lightning.report.figures import FIGURES, figures_of, scores_of

__all__ = ["FIGURES", "Comparison", "figures_of", "scores_of"]
