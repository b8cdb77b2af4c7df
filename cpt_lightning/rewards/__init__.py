"""Completion text -> parsed answer -> score."""

from cpt_lightning.rewards.answers import extract_answer, normalize_text
from cpt_lightning.rewards.rewards import Reward, RewardPart, grade, has_format, permutation_hits, score

__all__ = [
    "Reward",
    "RewardPart",
    "extract_answer",
    "grade",
    "has_format",
    "normalize_text",
    "permutation_hits",
    "score",
]
