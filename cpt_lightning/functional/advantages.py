"""Rewards of groups to advantages: how much better each completion is than what was to be expected.

Every estimator is a function of ``rewards [B, G]`` that gives ``advantages [B, G]``; they differ in the baseline that
is subtracted and in what the rest is divided by. In all of them a group whose rewards are all equal and that is
compared only with itself gets exactly 0: no update.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

AdvantageScale = Literal["std", "none"]
"""What a group's centred rewards are divided by, see :func:`group_normalized_advantages`."""


def group_normalized_advantages(
    rewards: Float[Tensor, "B G"], scale: AdvantageScale = "std", eps: float = 1e-6
) -> Float[Tensor, "B G"]:
    """Each reward minus its group's mean, divided by the group's standard deviation.

    ``A = (R - mean(R)) / (std(R) + eps)`` with the unbiased standard deviation (``ddof=1``): GRPO, DeepSeekMath (arXiv
    2402.03300), section 4.1.2.

    Args:
        rewards: ``[B, G]`` total reward of each completion.
        scale: ``"std"`` as above; ``"none"`` only subtracts the mean (Dr. GRPO, arXiv 2503.20783), which keeps hard and
            easy prompts, whose rewards vary least, from weighing most.
        eps: Keeps the division finite. verl has 1e-6, TRL has 1e-4; rewards of 0 and 1 in a group of 8 deviate by at
            least .35 unless all are equal, so the two differ by less than .03 %.

    Raises:
        ValueError: Groups of one completion, which has nothing to be compared with, or an unknown scale.
    """
    if scale not in get_args(AdvantageScale):
        raise ValueError(f"scale={scale!r} is none of {', '.join(get_args(AdvantageScale))}")
    centred = _centred(rewards)
    if scale == "none":
        return centred
    return centred / (_shifted(rewards).std(dim=1, keepdim=True, correction=1) + eps)


def leave_one_out_advantages(rewards: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Each reward minus the mean of its siblings': RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).

    ``A_i = R_i - mean of R_j over j != i``, which is ``G / (G - 1)`` times the distance from the group's mean.

    Args:
        rewards: ``[B, G]`` total reward of each completion.

    Raises:
        ValueError: Groups of one completion.
    """
    group_size = rewards.shape[1]
    return _centred(rewards) * (group_size / max(1, group_size - 1))


def greedy_baseline_advantages(
    rewards: Float[Tensor, "B G"], greedy_rewards: Float[Tensor, " B"]
) -> Float[Tensor, "B G"]:
    """Each reward minus that of the prompt's greedy completion: ReMax (Li et al. 2023, arXiv 2310.10505, eq. 7).

    Args:
        rewards: ``[B, G]`` total reward of each sampled completion; a group may be one completion.
        greedy_rewards: ``[B]`` reward of the most probable completion of each prompt.
    """
    return rewards - greedy_rewards[:, None]


def whitened_advantages(
    rewards: Float[Tensor, "B G"],
    mean: Float[Tensor, ""],
    variance: Float[Tensor, ""],
    eps: float = 1e-8,
) -> Float[Tensor, "B G"]:
    """Rewards with the mean and the variance of the whole batch taken out: REINFORCE++ (Hu 2025, arXiv 2501.03262).

    ``A = (R - mean) / sqrt(variance + eps)``. Of centred rewards (:func:`group_normalized_advantages` without a scale)
    it is the same paper's REINFORCE++-baseline.

    Args:
        rewards: ``[B, G]`` total reward of each completion, or what is left of it above its group's mean.
        mean: Over the tokens of the batch, on all ranks; see :func:`token_moments`.
        variance: The same, unbiased.
        eps: Keeps the division finite (verl: 1e-8).
    """
    # Where no reward differs from another, the mean's rounding must not be blown up by the small eps.
    return torch.where(variance > eps, (rewards - mean) * torch.rsqrt(variance + eps), 0.0)


def token_moments(rewards: Float[Tensor, "B G"], lengths: Float[Tensor, "B G"]) -> Float[Tensor, " 3"]:
    """Number of tokens, sum and sum of squares of the rewards that they carry, in float64; these add up over ranks.

    A completion's reward stands at each of its tokens, so long completions weigh more (as in verl and OpenRLHF).

    Args:
        rewards: ``[B, G]``.
        lengths: ``[B, G]`` tokens of each completion.
    """
    lengths, rewards = lengths.double(), rewards.double()
    return torch.stack([lengths.sum(), (lengths * rewards).sum(), (lengths * rewards.square()).sum()])


def mean_and_variance(moments: Float[Tensor, " 3"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The mean and the unbiased variance of :func:`token_moments`, those of several ranks added up."""
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    variance = (squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    return mean.float(), variance.float()


def one_zero_advantages(correct: Bool[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """1 for a correct completion and 0 for any other: 1-0 REINFORCE, which is SFT on the model's own right answers.

    The baseline of RL's Razor (arXiv 2509.04259) that samples on-policy and sees no negative example.

    Args:
        correct: ``[B, G]`` whether each completion is right.
    """
    return correct.float()


def zero_signal_fraction(advantages: Float[Tensor, "B G"]) -> Float[Tensor, ""]:
    """The share of groups whose advantages are all 0, from which nothing is learned; 0 without groups."""
    if len(advantages) == 0:
        return advantages.new_zeros(())
    return 1 - advantages.any(dim=1).to(advantages.dtype).mean()


def _centred(rewards: Tensor) -> Tensor:
    """Rewards minus their group's mean; exactly 0 where all are equal."""
    if rewards.shape[1] < 2:
        raise ValueError(
            f"group_size={rewards.shape[1]}: completions are compared with each other, so sample 2 or more"
        )
    shifted = _shifted(rewards)
    return shifted - shifted.mean(dim=1, keepdim=True)


def _shifted(rewards: Tensor) -> Tensor:
    """Rewards minus their group's first.

    The mean of equal floats may be one bit off (that of eight times .9 is), and 6e-8 over an eps of 1e-6 would be an
    advantage of .06 in a group that teaches nothing.
    """
    return rewards - rewards[:, :1]
