"""KL(policy || reference): per-token estimates from tokens that the policy sampled, and over the whole vocabulary.

Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), names them k1, k2 and k3. With
``d = log pi_ref - log pi`` they are ``-d``, ``d^2 / 2`` and ``exp(d) - d - 1``. As *values*, k1 and k3 are unbiased; k3
is never negative and varies far less while the policies are close. As *losses* they differ: on-policy, the gradient of
k2 is that of the KL, that of k1 is 0 on average, and that of k3 is the one of the reverse KL(reference || policy).

All estimates are computed in float32 or better: in bfloat16 the difference of two log-probabilities near -10 has steps
of .06.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cpt_lightning.functional.logprobs import CHUNK_LOGITS


def kl_k1(
    logps: Float[Tensor, "N T"], ref_logps: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"] | None = None
) -> Float[Tensor, "N T"]:
    """``log pi - log pi_ref``: unbiased, high variance, negative for many tokens.

    Args:
        logps: ``[N, T]`` log-probability of each token under the policy.
        ref_logps: ``[N, T]`` the same under the reference.
        mask: ``[N, T]`` true for tokens that count; the others give 0 with gradient 0, whatever stands there.
    """
    return -_log_ratio(logps, ref_logps, mask)


def kl_k2(
    logps: Float[Tensor, "N T"], ref_logps: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"] | None = None
) -> Float[Tensor, "N T"]:
    """``(log pi_ref - log pi)^2 / 2``: biased, never negative, with the gradient of the KL.

    Arguments as in :func:`kl_k1`.
    """
    return _log_ratio(logps, ref_logps, mask).square() / 2


def kl_k3(
    logps: Float[Tensor, "N T"], ref_logps: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"] | None = None
) -> Float[Tensor, "N T"]:
    """``pi_ref / pi - log(pi_ref / pi) - 1``: unbiased and never negative.

    GRPO's choice (DeepSeekMath, arXiv 2402.03300, eq. 4). Arguments as in :func:`kl_k1`. The log-ratio is bounded to
    [-20, 20], as in verl, because ``exp`` of a token that the policy all but ruled out would drown the step.
    """
    log_ratio = _log_ratio(logps, ref_logps, mask).clamp(-20, 20)
    # expm1, because near 0 the terms of exp(d) - d - 1 cancel: in float32 its rounding error, 1e-7, hides d below 5e-4.
    return torch.expm1(log_ratio) - log_ratio


def _log_ratio(logps: Tensor, ref_logps: Tensor, mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(logps.dtype, torch.float32)
    log_ratio = ref_logps.to(dtype) - logps.to(dtype)
    return log_ratio if mask is None else torch.where(mask, log_ratio, 0)


def kl_full(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    ref_hidden: Float[Tensor, "M R"],
    ref_weight: Float[Tensor, "V R"],
    temperature: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Tensor, " M"]:
    """KL(policy || reference) over the whole vocabulary, at each position: no estimate, and the gradient of the KL.

    ``sum_v pi(v) (log pi(v) - log pi_ref(v))``. Logits of both exist for one chunk of positions at a time; backward
    computes them again.

    Args:
        hidden: ``[M, H]`` final hidden states of the policy; gradients flow here.
        weight: ``[V, H]`` output matrix of the policy; gradients flow here.
        ref_hidden: ``[M, H']`` those of the reference.
        ref_weight: ``[V, H']`` output matrix of the reference.
        temperature: Divides the logits of both.
        chunk_logits: How many logits of each may exist at once.

    Returns:
        ``[M]`` in nats (float32).
    """
    return _by_chunks(_kl, hidden, weight, ref_hidden, ref_weight, temperature, chunk_logits)


def forward_kl(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    ref_hidden: Float[Tensor, "M R"],
    ref_weight: Float[Tensor, "V R"],
    temperature: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Tensor, " M"]:
    """KL(reference || policy) over the whole vocabulary, at each position.

    It needs no token that either of them sampled, so it holds on any text. This is the distillation loss of Learning
    without Forgetting (Li & Hoiem 2016, arXiv 1606.09282) at temperature 1, less the reference's entropy, on which no
    gradient depends. Arguments as in :func:`kl_full`.
    """
    return _by_chunks(lambda p, q: _kl(q, p), hidden, weight, ref_hidden, ref_weight, temperature, chunk_logits)


class Divergences(NamedTuple):
    """How far the policy is from the reference at each of M positions, over the whole vocabulary.

    Args:
        forward_kl: ``[M]`` KL(reference || policy) in nats.
        reverse_kl: ``[M]`` KL(policy || reference) in nats.
        total_variation: ``[M]`` half the sum of the differences of probabilities, in [0, 1].
        top1_agreement: ``[M]`` 1 where both find the same token the most probable, else 0.
    """

    forward_kl: Tensor
    reverse_kl: Tensor
    total_variation: Tensor
    top1_agreement: Tensor


def divergences(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    ref_hidden: Float[Tensor, "M R"],
    ref_weight: Float[Tensor, "V R"],
    temperature: float = 1.0,
    chunk_logits: int = CHUNK_LOGITS,
) -> Divergences:
    """Both divergences, total variation and agreement from one pass over the logits.

    Arguments as in :func:`kl_full`.
    """
    table = _by_chunks(_divergences, hidden, weight, ref_hidden, ref_weight, temperature, chunk_logits)
    return Divergences(*table.unbind(dim=1))


def _divergences(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """``[rows, 4]`` from log-probabilities ``[rows, V]``."""
    variation = (logps.exp() - ref_logps.exp()).abs().sum(dim=-1) / 2
    agreement = (logps.argmax(dim=-1) == ref_logps.argmax(dim=-1)).to(logps.dtype)
    return torch.stack([_kl(ref_logps, logps), _kl(logps, ref_logps), variation, agreement], dim=-1)


def _kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    return (logps.exp() * (logps - other_logps)).sum(dim=-1)


def _by_chunks(
    divergence: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    temperature: float,
    chunk_logits: int,
) -> Tensor:
    """``[M]`` or ``[M, D]`` divergences of policy and reference from log-probabilities ``[rows, V]``, by chunks."""

    def of_chunk(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
        logits = hidden @ weight.T, ref_hidden @ ref_weight.T
        return divergence(*((each.float() / temperature).log_softmax(dim=-1) for each in logits))

    rows = max(1, chunk_logits // len(weight))
    chunks = zip(hidden.split(rows), ref_hidden.detach().split(rows), strict=True)
    checkpointed = partial(checkpoint, of_chunk, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([checkpointed(part, weight, ref_part, ref_weight.detach()) for part, ref_part in chunks])
