"""Learning dynamics: what one update on a text x_u does to the log-probabilities of another, x_v.

To first order a gradient step of size eta changes the log-probabilities of all V tokens at each position of x_v by

    d log pi(x_v) = -eta A(x_v) K(x_v, x_u) G(x_u),

with the Jacobian of the log-softmax ``A = I - 1 pi'``, the kernel K of the logits' gradients, and the gradient of the
loss with respect to the logits G (Ren & Sutherland, arXiv 2407.10490; arXiv 2506.23508). The Frobenius norms of A and G
have closed forms at each position, so that V x V and T x V tables are not needed:

    ||A||^2 = V - 2 + V ||pi||^2,    ||d log pi_y / d logits||^2 = 1 - 2 pi_y + ||pi||^2.

All is computed in float64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cpt_lightning.functional.logprobs import CHUNK_LOGITS


class LogProbChange(NamedTuple):
    """What an update did at each of M positions of a text.

    Args:
        of_token: ``[M]`` for the token that stands there, in nats.
        squared: ``[M]`` ``||d log pi||^2``, over the whole vocabulary.
        jacobian_squared: ``[M]`` ``||A||^2`` before the update.
    """

    of_token: Tensor
    squared: Tensor
    jacobian_squared: Tensor


@torch.no_grad()
def log_prob_change(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    new_hidden: Float[Tensor, "M H"],
    new_weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " M"],
    chunk_logits: int = CHUNK_LOGITS,
) -> LogProbChange:
    """Compares a text's log-probabilities before and after an update.

    Args:
        hidden: ``[M, H]`` hidden states that predict the tokens, before the update.
        weight: ``[V, H]`` output matrix before it.
        new_hidden: ``[M, H]`` hidden states after it.
        new_weight: ``[V, H]`` output matrix after it.
        targets: ``[M]`` the tokens.
        chunk_logits: How many logits of each may exist at once.
    """
    parts = []
    for rows in _chunks(len(hidden), max(1, chunk_logits // len(weight))):
        logps = _log_softmax(hidden[rows], weight)
        difference = _log_softmax(new_hidden[rows], new_weight) - logps
        token = difference.gather(1, targets[rows, None]).squeeze(1)
        jacobian = len(weight) - 2 + len(weight) * logps.exp().square().sum(dim=1)
        parts.append(torch.stack([token, difference.square().sum(dim=1), jacobian]))
    return LogProbChange(*torch.cat(parts, dim=1))


@torch.no_grad()
def residual_squared(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " M"],
    temperature: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Tensor, " M"]:
    """``||d log pi_y / d logits||^2`` at each position: that of ``(y - pi) / temperature``.

    Times the square of the loss's derivative with respect to the token's log-probability it is ``||G||^2``.

    Args:
        hidden: ``[M, H]`` hidden states that predict the tokens.
        weight: ``[V, H]`` output matrix.
        targets: ``[M]`` the tokens y.
        temperature: Divides the logits.
        chunk_logits: How many logits may exist at once.
    """
    parts = []
    for rows in _chunks(len(hidden), max(1, chunk_logits // len(weight))):
        pi = _log_softmax(hidden[rows], weight, temperature).exp()
        rest = pi.scatter(1, targets[rows, None], 0.0).square().sum(dim=1)
        # (1 - pi_y)^2 rather than 1 - 2 pi_y + pi_y^2, which cancels where the token is sure.
        parts.append((1 - pi.gather(1, targets[rows, None]).squeeze(1)).square() + rest)
    return torch.cat(parts) / temperature**2


def kernel_bound(
    change_squared: Float[Tensor, "*rows"], jacobian_squared: Float[Tensor, "*rows"], gradient_squared: float
) -> Float[Tensor, "*rows"]:
    """LBK, ``||d log pi(x_v)||^2 / (||A(x_v)||^2 ||G(x_u)||^2)``, a lower bound of ``eta^2 ||K(x_v, x_u)||^2``.

    It is one because ``||A K G|| <= ||A|| ||K|| ||G||``; to first order, for a plain gradient step of size eta.

    Args:
        change_squared: Summed over a text's positions.
        jacobian_squared: The same.
        gradient_squared: ``||G||^2`` of all that the update learned from.

    >>> kernel_bound(torch.tensor([8.0]), torch.tensor([4.0]), 0.5)
    tensor([4.])
    """
    return change_squared / (jacobian_squared * gradient_squared)


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float = 1.0) -> Tensor:
    # In float64: log pi of a token that is all but sure is lost between logits of 30, whose float32 has steps of 2e-6.
    return ((hidden @ weight.T).double() / temperature).log_softmax(dim=-1)


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, num_rows, size))
