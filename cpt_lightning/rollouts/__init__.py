"""Prompts to groups of completions, and groups to log-probabilities: the prompt and its image are paid for once."""

from cpt_lightning.rollouts.attempts import Attempts, Hint
from cpt_lightning.rollouts.packed_group import PackedGroup, pack_group
from cpt_lightning.rollouts.packing import completion_hidden, completion_logprobs, run_prompts
from cpt_lightning.rollouts.sampling import Sampling, sample_groups
from cpt_lightning.rollouts.selection import Selection

__all__ = [
    "Attempts",
    "Hint",
    "PackedGroup",
    "Sampling",
    "Selection",
    "completion_hidden",
    "completion_logprobs",
    "pack_group",
    "run_prompts",
    "sample_groups",
]
