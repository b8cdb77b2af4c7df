"""Pure functions of tensors: the mathematics, without model, data or Trainer."""

from cpt_lightning.functional.advantages import AdvantageScale, group_normalized_advantages, zero_signal_fraction
from cpt_lightning.functional.kl import kl_k1, kl_k2, kl_k3
from cpt_lightning.functional.policy_loss import PolicyStats, clipped_policy_loss
from cpt_lightning.functional.reductions import Reduction, masked_mean, token_weights, weighted_sum

__all__ = [
    "AdvantageScale",
    "PolicyStats",
    "Reduction",
    "clipped_policy_loss",
    "group_normalized_advantages",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "masked_mean",
    "token_weights",
    "weighted_sum",
    "zero_signal_fraction",
]
