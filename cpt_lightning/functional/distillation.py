"""Divergence of whole next-token distributions, without ever holding the logits of all positions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cpt_lightning.functional.logprobs import CHUNK_LOGITS


def forward_kl(
    hidden: Float[Tensor, "M H"],
    weight: Float[Tensor, "V H"],
    ref_hidden: Float[Tensor, "M H"],
    ref_weight: Float[Tensor, "V H"],
    chunk_logits: int = CHUNK_LOGITS,
) -> Float[Tensor, " M"]:
    """KL(reference || policy) of the next token at every position, over the whole vocabulary.

    Unlike the estimates in ``kl.py`` it needs no token that either of them sampled, so it holds on any text. This is
    the distillation loss of Learning without Forgetting (Li & Hoiem 2016, arXiv 1606.09282) at temperature 1, less the
    reference's entropy, on which no gradient depends.

    Args:
        hidden: ``[M, H]`` final hidden states of the policy.
        weight: ``[V, H]`` output matrix of the policy.
        ref_hidden: ``[M, H]`` the same of the reference.
        ref_weight: ``[V, H]`` the same of the reference.
        chunk_logits: How many logits of each model may exist at once; backward computes them again.

    Returns:
        ``[M]`` in nats (float32, differentiable in ``hidden`` and ``weight``).
    """
    rows = max(1, chunk_logits // len(weight))
    parts = [
        checkpoint(_kl_of_chunk, part, weight, ref_part, ref_weight, use_reentrant=False, preserve_rng_state=False)
        for part, ref_part in zip(hidden.split(rows), ref_hidden.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _kl_of_chunk(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    logps = (hidden @ weight.T).float().log_softmax(dim=-1)
    ref_logps = (ref_hidden @ ref_weight.T).float().log_softmax(dim=-1)
    return (ref_logps.exp() * (ref_logps - logps)).sum(dim=-1)
