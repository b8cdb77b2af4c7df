"""The policy-gradient losses of PPO, GRPO, GSPO and CISPO, and what they tell about the step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cpt_lightning.functional.reductions import masked_mean, weighted_sum

RatioLevel = Literal["token", "sequence"]
"""Whose probability the ratio pi / pi_old compares, see :func:`clipped_policy_loss`."""


@dataclass(frozen=True)
class PolicyStats:
    """What happened to the tokens of a policy update: detached scalars, means over unmasked tokens.

    Args:
        clip_fraction_low: Share of tokens with a negative advantage whose ratio fell below ``1 - clip_low``.
        clip_fraction_high: Share of tokens with a positive advantage whose ratio rose above ``1 + clip_high``.
        dual_clip_fraction: Share of tokens that the dual clip bounds; 0 without it.
        ratio_mean: Mean of the ratio pi / pi_old; 1 on-policy.
        num_tokens: Unmasked tokens, by which :meth:`mean` weighs.
    """

    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    dual_clip_fraction: Tensor
    ratio_mean: Tensor
    num_tokens: Tensor

    @property
    def clip_fraction(self) -> Tensor:
        """Share of tokens that were clipped on either side and so have no gradient."""
        return self.clip_fraction_low + self.clip_fraction_high

    @staticmethod
    def of_nothing(zero: Tensor) -> "PolicyStats":
        """Those of no tokens, each the given scalar."""
        return PolicyStats(**{field.name: zero for field in fields(PolicyStats)})

    @staticmethod
    def mean(parts: "Sequence[PolicyStats]") -> "PolicyStats":
        """The statistics of a mini-batch from those of its micro-batches.

        Raises:
            ValueError: No parts.
        """
        if not parts:
            raise ValueError("the mean of no policy statistics: give those of one micro-batch or more")
        num_tokens = torch.stack([part.num_tokens for part in parts])
        weights = num_tokens / num_tokens.sum().clamp(min=1)
        names = [field.name for field in fields(PolicyStats) if field.name != "num_tokens"]
        means = {name: (weights * torch.stack([getattr(part, name) for part in parts])).sum() for name in names}
        return PolicyStats(**means, num_tokens=num_tokens.sum())


def clipped_policy_loss(
    logps: Float[Tensor, "N T"],
    old_logps: Float[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, "N T"],
    token_weights: Float[Tensor, "N T"],
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float | None = None,
    level: RatioLevel = "token",
) -> tuple[Float[Tensor, ""], PolicyStats]:
    """The policy loss of one micro-batch, ``sum(token_weights * per_token_loss)``, and its statistics.

    Per token, with ``ratio = pi / pi_old``: ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)`` (PPO,
    arXiv 1707.06347, eq. 7; GRPO, arXiv 2402.03300, eq. 3; two bounds, DAPO, arXiv 2503.14476, eq. 10). On-policy the
    ratio is 1 and the gradient is that of ``-A log pi``.

    Args:
        logps: ``[N, T]`` log-probability of each token under the policy; gradients flow here.
        old_logps: ``[N, T]`` the same under the policy that sampled the tokens; on-policy ``logps.detach()``.
        advantages: ``[N]`` advantage of each completion.
        mask: ``[N, T]`` true for tokens that count. What stands at the others, even inf or NaN, has no influence, and
            its gradient is 0; a mask without a token gives a loss of 0 that still backpropagates.
        token_weights: ``[N, T]`` from :func:`~cpt_lightning.functional.token_weights`, of the whole mini-batch.
        clip_low: How far the ratio may fall below 1 before a token with a negative advantage stops learning.
        clip_high: How far it may rise above 1 before a token with a positive advantage stops learning.
        dual_clip: With a negative advantage the loss is bounded by ``-dual_clip * A`` (Ye et al. 2020, arXiv
            1912.09729); paper A takes 3.0, ``None`` is without.
        level: ``"token"`` as above; ``"sequence"`` compares whole completions by the geometric mean of their tokens'
            ratios, ``exp(mean_t log ratio_t)`` (GSPO, arXiv 2507.18071, eq. 7, which clips 3e-4 low and 4e-4 high and
            takes the mean over sequences). Each token's gradient is that of its own log-probability times the
            sequence's ratio (eq. 13), so any reduction may follow.

    Raises:
        ValueError: ``dual_clip`` of 1 or less, which would cut off the update of on-policy tokens; or an unknown level.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip}: it bounds ratios above 1, so it has to be above 1 (paper A: 3.0)")
    if level not in get_args(RatioLevel):
        raise ValueError(f"level={level!r} is none of {', '.join(get_args(RatioLevel))}")
    ratio = (_ratio if level == "token" else _sequence_ratio)(logps, old_logps, mask)
    gain = advantages.to(ratio.dtype).detach()[:, None]
    objective = torch.minimum(ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain)
    bounded = torch.zeros_like(mask)
    if dual_clip is not None:
        bounded = (gain < 0) & (ratio > dual_clip)
        objective = torch.where(bounded, dual_clip * gain, objective)
    stats = PolicyStats(
        clip_fraction_low=_share((gain < 0) & (ratio < 1 - clip_low), mask),
        clip_fraction_high=_share((gain > 0) & (ratio > 1 + clip_high), mask),
        dual_clip_fraction=_share(bounded, mask),
        ratio_mean=masked_mean(ratio.detach(), mask),
        num_tokens=mask.sum(),
    )
    return weighted_sum(-objective, token_weights, mask), stats


def clipped_weight_loss(
    logps: Float[Tensor, "N T"],
    old_logps: Float[Tensor, "N T"],
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, "N T"],
    token_weights: Float[Tensor, "N T"],
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> tuple[Float[Tensor, ""], PolicyStats]:
    """REINFORCE with clipped importance weights: CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    Per token ``-sg[clip(ratio, 1 - clip_low, 1 + clip_high)] * A * log pi``: a clipped token goes on learning, where
    PPO's has no gradient. Arguments as in :func:`clipped_policy_loss`.

    Args:
        logps: ``[N, T]`` under the policy; gradients flow here.
        old_logps: ``[N, T]`` under the policy that sampled.
        advantages: ``[N]``.
        mask: ``[N, T]``.
        token_weights: ``[N, T]``; the paper takes the token mean.
        clip_low: How far below 1 a weight may be; 1 or more, as in the paper, sets no lower bound.
        clip_high: How far above 1; the paper publishes no value, TRL has weights of up to 5.
    """
    ratio = _ratio(logps, old_logps, mask).detach()
    gain = advantages.to(ratio.dtype).detach()[:, None]
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    stats = PolicyStats(
        clip_fraction_low=_share(ratio < 1 - clip_low, mask),
        clip_fraction_high=_share(ratio > 1 + clip_high, mask),
        dual_clip_fraction=_share(torch.zeros_like(mask), mask),
        ratio_mean=masked_mean(ratio, mask),
        num_tokens=mask.sum(),
    )
    logps = torch.where(mask, logps.to(ratio.dtype), 0)  # before the product: 0 * inf is NaN
    return weighted_sum(-weight * gain * logps, token_weights, mask), stats


def _ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """The ratio pi / pi_old ``[N, T]`` in float32 or better, 1 where masked."""
    dtype = torch.promote_types(logps.dtype, torch.float32)
    # Masked before exp: inf there would have a NaN gradient even with weight 0. Bounded as in verl, because where exp
    # overflows the clipped branch's zero gradient times inf is NaN.
    log_ratio = torch.where(mask, logps.to(dtype) - old_logps.to(dtype).detach(), 0)
    return log_ratio.clamp(-20, 20).exp()


def _sequence_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """``[N, T]`` the geometric mean of a sequence's ratios, with the gradient of each token's own log-probability."""
    dtype = torch.promote_types(logps.dtype, torch.float32)
    logps, old_logps = (torch.where(mask, x.to(dtype), 0) for x in (logps, old_logps.detach()))
    mean = masked_mean((logps - old_logps).detach(), mask, dim=1)[:, None]
    return (mean + logps - logps.detach()).clamp(-20, 20).exp()


def _share(condition: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(condition.float(), mask)
