"""Completion text -> parsed answer -> score."""

from cpt_lightning.rewards.answers import extract_answer
from cpt_lightning.rewards.formats import has_format
from cpt_lightning.rewards.grading import grade, permutation_hits
from cpt_lightning.rewards.lengths import OverlongPenalty
from cpt_lightning.rewards.letters import with_option_text
from cpt_lightning.rewards.normalization import normalize_text
from cpt_lightning.rewards.rewards import Reward, RewardPart, is_right, score
from cpt_lightning.rewards.yes_no import YES_NO_COUNTS, with_ratios

__all__ = [
    "YES_NO_COUNTS",
    "OverlongPenalty",
    "Reward",
    "RewardPart",
    "extract_answer",
    "grade",
    "has_format",
    "is_right",
    "normalize_text",
    "permutation_hits",
    "score",
    "with_option_text",
    "with_ratios",
]
