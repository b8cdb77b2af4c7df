"""Finished runs, compared: what each learned, lost and cost."""

from cpt_lightning.report.arms import Arm, arms_of, runs_among
from cpt_lightning.report.comparison import Comparison
from cpt_lightning.report.figures import FIGURES, Figures, distances_of, figures_of, scores_of
from cpt_lightning.report.page import Report

__all__ = [
    "FIGURES",
    "Arm",
    "Comparison",
    "Figures",
    "Report",
    "arms_of",
    "distances_of",
    "figures_of",
    "runs_among",
    "scores_of",
]
