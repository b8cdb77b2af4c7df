"""How weights have changed: how far, how many of them, and in how many directions."""

import torch
from jaxtyping import Float
from torch import Tensor

Matrix = Float[Tensor, "rows columns"]


def num_changed(before: Float[Tensor, "..."], now: Float[Tensor, "..."]) -> int:
    """How many weights have another value in bfloat16 now.

    Reinforcement fine-tuning in bfloat16 leaves most weights as they are, for its steps are smaller than what the
    format can tell apart (arXiv 2505.11711 counts 5 to 30 % that change).

    Args:
        before: Weights as they were.
        now: The same weights now.

    Example:
        >>> num_changed(torch.tensor([1.0, 1.0, -2.0]), torch.tensor([1.003, 1.005, -2.0]))  # next to 1 is 1 + 2^-7
        1
    """
    return int((before.bfloat16() != now.bfloat16()).sum())


def effective_rank(change: Matrix) -> float:
    """``exp(H)`` of the singular values as shares of their sum: Roy & Vetterli 2007, "The effective rank", eq. 2.

    r equal singular values have the effective rank r, whatever their size; 0 for a matrix of zeros.

    Args:
        change: What a weight matrix has changed by.

    Example:
        >>> effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0])))
        2.0
    """
    values = torch.linalg.svdvals(change.float())
    shares = values.double() / values.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.entr(shares).sum().exp().item() if values.any() else 0.0
