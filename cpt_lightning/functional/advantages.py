"""Rewards of a group to advantages: how much better each completion is than its siblings.

Every estimator is a function ``rewards [B, G] -> advantages [B, G]``. Those that differ in more than the scale (leave
one out, a greedy baseline, whitening over the batch) are siblings of :func:`group_normalized_advantages`, not options.
"""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

AdvantageScale = Literal["std", "none"]
"""What a group's centred rewards are divided by, see :func:`group_normalized_advantages`."""


def group_normalized_advantages(
    rewards: Float[Tensor, "B G"], scale: AdvantageScale = "std", eps: float = 1e-6
) -> Float[Tensor, "B G"]:
    """Each reward minus its group's mean, divided by the group's standard deviation.

    ``A = (R - mean(R)) / (std(R) + eps)`` with the unbiased standard deviation (``ddof=1``): GRPO, DeepSeekMath (arXiv
    2402.03300), section 4.1.2. A group whose rewards are all equal gets exactly 0: no update.

    Args:
        rewards: ``[B, G]`` total reward of each completion.
        scale: ``"std"`` as above; ``"none"`` only subtracts the mean (Dr. GRPO, arXiv 2503.20783), which keeps hard and
            easy prompts, whose rewards vary least, from weighing most.
        eps: Keeps the division finite. verl has 1e-6, TRL has 1e-4; rewards of 0 and 1 in a group of 8 deviate by at
            least .35 unless all are equal, so the two differ by less than .03 %.

    Raises:
        ValueError: Groups of one completion, which has nothing to be compared with, or an unknown scale.
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"group_size={rewards.shape[1]}: completions are compared with each other, so sample 2 or more"
        )
    if scale not in get_args(AdvantageScale):
        raise ValueError(f"scale={scale!r} is none of {', '.join(get_args(AdvantageScale))}")
    # Shifted by the first reward, because the mean of equal floats may be one bit off (that of eight times .9 is), and
    # 6e-8 over an eps of 1e-6 would be an advantage of .06 in a group that teaches nothing.
    shifted = rewards - rewards[:, :1]
    centred = shifted - shifted.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred
    return centred / (shifted.std(dim=1, keepdim=True, correction=1) + eps)


def zero_signal_fraction(rewards: Float[Tensor, "B G"]) -> Float[Tensor, ""]:
    """The share of groups whose rewards are all equal, from which nothing is learned; 0 without groups."""
    if len(rewards) == 0:
        return rewards.new_zeros(())
    return (rewards == rewards[:, :1]).all(dim=1).to(rewards.dtype).mean()
