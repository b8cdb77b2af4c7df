"""Pure functions of tensors: the mathematics, without model, data or Trainer."""

from cpt_lightning.functional.advantages import (
    AdvantageScale,
    greedy_baseline_advantages,
    group_normalized_advantages,
    leave_one_out_advantages,
    mean_and_variance,
    one_zero_advantages,
    token_moments,
    whitened_advantages,
    zero_signal_fraction,
)
from cpt_lightning.functional.importance import Mismatch, truncated_importance
from cpt_lightning.functional.influence import LogProbChange, kernel_bound, log_prob_change, residual_squared
from cpt_lightning.functional.kl import Divergences, divergences, forward_kl, kl_full, kl_k1, kl_k2, kl_k3
from cpt_lightning.functional.policy_loss import PolicyStats, RatioLevel, clipped_policy_loss, clipped_weight_loss
from cpt_lightning.functional.reductions import Reduction, masked_mean, token_weights, weighted_sum
from cpt_lightning.functional.weight_change import effective_rank, num_changed

__all__ = [
    "AdvantageScale",
    "Divergences",
    "LogProbChange",
    "Mismatch",
    "PolicyStats",
    "RatioLevel",
    "Reduction",
    "clipped_policy_loss",
    "clipped_weight_loss",
    "divergences",
    "effective_rank",
    "forward_kl",
    "greedy_baseline_advantages",
    "group_normalized_advantages",
    "kernel_bound",
    "kl_full",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "leave_one_out_advantages",
    "log_prob_change",
    "masked_mean",
    "mean_and_variance",
    "num_changed",
    "one_zero_advantages",
    "residual_squared",
    "token_moments",
    "token_weights",
    "truncated_importance",
    "weighted_sum",
    "whitened_advantages",
    "zero_signal_fraction",
]
