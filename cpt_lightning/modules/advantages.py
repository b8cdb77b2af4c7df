"""Which advantage an option's name means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from cpt_lightning.functional import (
    greedy_baseline_advantages,
    group_normalized_advantages,
    leave_one_out_advantages,
    mean_and_variance,
    one_zero_advantages,
    token_moments,
    whitened_advantages,
)
from cpt_lightning.types import Rollout

Advantage = Literal[
    "grpo", "dr_grpo", "rloo", "remax", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "one_zero"
]
"""How a completion's reward becomes its advantage, see :func:`advantages_of`."""


def advantages_of(rollout: Rollout, kind: Advantage, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """``[B, G]`` advantages of a rollout's completions.

    Args:
        rollout: The groups and their rewards.
        kind: ``grpo``: distance from the group's mean, over its standard deviation; ``dr_grpo``: without the latter;
            ``rloo``: distance from the siblings' mean; ``remax``: from the reward of the prompt's greedy completion;
            ``reinforce_plus_plus``: rewards whitened over the whole batch, ``reinforce_plus_plus_baseline``: what is
            left of them above their group's mean, whitened; ``one_zero``: 1 where the answer is right, else 0.
        sum_over_ranks: Adds a tensor up over all ranks, for what is whitened.
    """
    rewards = rollout.rewards
    match kind:
        case "grpo":
            return group_normalized_advantages(rewards, "std")
        case "dr_grpo":
            return group_normalized_advantages(rewards, "none")
        case "rloo":
            return leave_one_out_advantages(rewards)
        case "remax":
            assert rollout.greedy_rewards is not None
            return greedy_baseline_advantages(rewards, rollout.greedy_rewards)
        case "one_zero":
            return one_zero_advantages(rollout.reward_parts["accuracy"] >= 1)
        case "reinforce_plus_plus_baseline":
            rewards = group_normalized_advantages(rewards, "none")
    moments = token_moments(rewards, rollout.completions.lengths.view_as(rewards).float() * rollout.counts)
    return whitened_advantages(rewards, *mean_and_variance(sum_over_ranks(moments)))
