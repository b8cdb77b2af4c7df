"""Prompts to groups of completions, and groups to log-probabilities: the prompt and its image are paid for once."""

from cpt_lightning.rollouts.packing import completion_hidden, completion_logprobs, run_prompts
from cpt_lightning.rollouts.sampling import Sampling, sample_groups

__all__ = ["Sampling", "completion_hidden", "completion_logprobs", "run_prompts", "sample_groups"]
