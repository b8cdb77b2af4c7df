"""Prompts to groups of completions, and groups to log-probabilities: the prompt and its image are paid for once."""

from cpt_lightning.rollouts.attempts import Attempts, Hint
from cpt_lightning.rollouts.engine import Sampler
from cpt_lightning.rollouts.packed_group import PackedGroup, pack_group
from cpt_lightning.rollouts.packing import completion_hidden, completion_logprobs, run_prompts
from cpt_lightning.rollouts.sampling import Sampling, sample_groups
from cpt_lightning.rollouts.selection import Selection
from cpt_lightning.rollouts.vllm import VLLM

__all__ = [
    "VLLM",
    "Attempts",
    "Hint",
    "PackedGroup",
    "Sampler",
    "Sampling",
    "Selection",
    "completion_hidden",
    "completion_logprobs",
    "pack_group",
    "run_prompts",
    "sample_groups",
]
