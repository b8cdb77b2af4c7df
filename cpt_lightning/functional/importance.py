"""What another engine sampled, learned by the policy: how far the two are apart, and weights that make up for it.

One engine samples with kernels of its own, another learns; with equal weights their probabilities differ by rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cpt_lightning.functional.kl import kl_k1, kl_k3
from cpt_lightning.functional.policy_loss import RatioLevel
from cpt_lightning.functional.reductions import masked_mean


@dataclass(frozen=True)
class Mismatch:
    """How far a policy is from the sampler of its tokens: detached scalars, over unmasked tokens.

    Args:
        mean: Mean absolute difference of log-probabilities, nats.
        max: Largest one.
        kl_k1: KL(sampler || policy) by ``log sampler - log policy``.
        kl_k3: The same by ``ratio - log ratio - 1`` with ``ratio = policy / sampler``.
        num_tokens: Unmasked tokens, by which :meth:`of_all` weighs.
    """

    mean: Tensor
    max: Tensor
    kl_k1: Tensor
    kl_k3: Tensor
    num_tokens: Tensor

    @property
    def shown(self) -> dict[str, Tensor]:
        """What is logged, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "num_tokens"}

    @staticmethod
    def of_nothing(zero: Tensor) -> "Mismatch":
        """That of no tokens, each number the given scalar."""
        return Mismatch(**{field.name: zero for field in fields(Mismatch)})

    @staticmethod
    def between(
        logps: Float[Tensor, "N T"], sampler_logps: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
    ) -> "Mismatch":
        """Of the tokens of a micro-batch.

        Args:
            logps: ``[N, T]`` log-probability of each token under the policy, with the weights that sampled.
            sampler_logps: ``[N, T]`` the same as the sampler gave it.
            mask: ``[N, T]`` true for tokens that count.
        """
        logps, sampler_logps = logps.detach(), sampler_logps.detach()
        difference = kl_k1(sampler_logps, logps, mask)
        return Mismatch(
            mean=masked_mean(difference.abs(), mask),
            max=difference.abs().amax(),
            kl_k1=masked_mean(difference, mask),
            kl_k3=masked_mean(kl_k3(sampler_logps, logps, mask), mask),
            num_tokens=mask.sum(),
        )

    @staticmethod
    def of_all(parts: "Sequence[Mismatch]") -> "Mismatch":
        """Of all micro-batches of a step.

        Raises:
            ValueError: No parts.
        """
        if not parts:
            raise ValueError("the mismatch of no micro-batches: give one or more")
        num_tokens = torch.stack([part.num_tokens for part in parts])
        weights = num_tokens / num_tokens.sum().clamp(min=1)
        means = {
            name: (weights * torch.stack([part.shown[name] for part in parts])).sum()
            for name in ("mean", "kl_k1", "kl_k3")
        }
        return Mismatch(max=torch.stack([part.max for part in parts]).amax(), num_tokens=num_tokens.sum(), **means)


def truncated_importance(
    logps: Float[Tensor, "N T"],
    sampler_logps: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    level: RatioLevel,
    cap: float,
) -> Float[Tensor, "N T"]:
    """``min(policy / sampler, cap)``, by which a token's loss is weighed; carries no gradient, and is 1 where masked.

    Truncated importance sampling (Ionides 2008), between engines as in Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training".

    Args:
        logps: ``[N, T]`` log-probability of each token under the policy, with the weights that sampled.
        sampler_logps: ``[N, T]`` the same as the sampler gave it.
        mask: ``[N, T]`` true for tokens that count.
        level: ``"token"``: each token's ratio; ``"sequence"``: the product of the completion's, unbiased but for the
            cap, and of far larger variance.
        cap: Largest weight.
    """
    log_ratio = kl_k1(logps.detach(), sampler_logps.detach(), mask)
    if level == "sequence":
        log_ratio = torch.where(mask, log_ratio.sum(dim=1, keepdim=True), 0)
    return log_ratio.clamp(-20, 20).exp().clamp(max=cap)
