"""From one number per token to one number: the weights of a loss, and masked means.

How a loss averages over tokens is a choice the field disputes, so it has one place. A loss is ``(weights *
per_token).sum()`` with the weights of a whole mini-batch; micro-batches then simply add up, whatever their size.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Reduction = Literal["token_mean", "sequence_mean", "constant"]
"""How a loss averages over tokens, see :func:`token_weights`."""


def token_weights(
    mask: Bool[Tensor, "N T"],
    reduction: Reduction,
    *,
    constant: float | None = None,
    num_sequences: float | None = None,
    num_tokens: float | None = None,
) -> Float[Tensor, "N T"]:
    """The weight of each token in a mini-batch's loss, 0 where masked.

    Either call it once on the mask of the whole mini-batch and slice the result, or call it per micro-batch with the
    counts of the whole mini-batch. DDP and FSDP average gradients over ranks: with several ranks pass the counts of all
    ranks divided by the number of ranks.

    Args:
        mask: ``[N, T]`` true for the tokens that count.
        reduction: ``"token_mean"``, every token weighs the same (DAPO, arXiv 2503.14476, eq. 8);
            ``"sequence_mean"``, the mean over sequences of each one's token mean (GRPO, DeepSeekMath, arXiv 2402.03300,
            eq. 3), where a sequence without a token still counts as a sequence, with loss 0;
            ``"constant"``, the mean over sequences of token sums divided by ``constant`` (Dr. GRPO, arXiv 2503.20783,
            which takes the longest completion allowed).
        constant: The divisor of ``"constant"``.
        num_sequences: Sequences in the mini-batch; by default those of ``mask``.
        num_tokens: Unmasked tokens in the mini-batch; by default those of ``mask``.

    Raises:
        ValueError: Unknown reduction, ``"constant"`` without a positive constant, or a constant with another reduction.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction={reduction!r} is none of {', '.join(get_args(Reduction))}")
    if constant is not None and reduction != "constant":
        raise ValueError(
            f"constant={constant} with reduction={reduction!r}: leave it out, only 'constant' divides by it"
        )
    counted = mask.float()
    # Of several ranks' counts the mean may lie below 1; where all are 0 there is nothing to divide.
    sequences = (len(mask) if num_sequences is None else num_sequences) or 1
    if reduction == "token_mean":
        return counted / (counted.sum().clamp(min=1) if num_tokens is None else num_tokens or 1)
    if reduction == "sequence_mean":
        return counted / counted.sum(dim=1, keepdim=True).clamp(min=1) / sequences
    if constant is None or constant <= 0:
        raise ValueError(
            f"constant={constant}: 'constant' divides by a number above 0, say the longest completion allowed"
        )
    return counted / (constant * sequences)


def weighted_sum(
    values: Float[Tensor, "N T"], weights: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, ""]:
    """The sum of ``weights * values`` over unmasked tokens; what stands at masked ones, even NaN, has no influence."""
    return torch.where(mask, weights * values, 0).sum()


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None) -> Tensor:
    """The mean of unmasked values, over everything or along ``dim``; 0 where there are none.

    Args:
        values: Any shape; what stands at masked places, even NaN, has no influence, nor has its gradient.
        mask: Same shape, true where a value counts.
        dim: Dimension to average over; ``None`` averages everything to a scalar.
    """
    kept = torch.where(mask, values, 0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)
