"""Log-probabilities of given tokens without ever holding the logits of all positions.

With Qwen's vocabulary of 151,936 the logits of 4,096 positions are 2.5 GB in float32, and softmax and backward want
several of them. Here logits exist for one chunk of positions at a time, forward, and again in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**24
"""Logits held at once (64 MB in float32)."""


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk_logits: int = CHUNK_LOGITS
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of the distribution it came from.

    Args:
        hidden: ``[M, H]`` hidden states that predict the targets.
        weight: ``[V, H]`` output matrix.
        targets: ``[M]`` token ids.
        temperature: Divides the logits.
        chunk_logits: How many logits may exist at once.

    Returns:
        ``[M]`` log-probabilities in nats (float32, differentiable in ``hidden`` and ``weight``) and ``[M]`` entropies
        in nats (float32, no gradient).
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    rows = max(1, chunk_logits // len(weight))
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, dtype, rows)


class _TokenLogprobs(torch.autograd.Function):
    """Softmax over the vocabulary, chunk by chunk; backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, dtype, rows):
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropies, normalizers = torch.empty_like(logps), torch.empty_like(logps)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for chunk in _chunks(len(hidden), rows):
                logits = _logits(hidden[chunk], matrix, temperature)
                normalizers[chunk] = logits.logsumexp(dim=-1)
                logits -= normalizers[chunk, None]  # log-probabilities from here on
                logps[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1)
                entropies[chunk] = -(logits.exp() * logits).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.temperature, ctx.dtype, ctx.rows = temperature, dtype, rows
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, _):
        hidden, weight, targets, normalizers = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(ctx.dtype)
            for chunk in _chunks(len(hidden), ctx.rows):
                # d logp[target] / d logits = onehot(target) - softmax
                grad = torch.exp(_logits(hidden[chunk], matrix, ctx.temperature) - normalizers[chunk, None]).neg_()
                grad.scatter_add_(1, targets[chunk, None], torch.ones_like(grad[:, :1]))
                grad = (grad * (grad_logps[chunk, None] / ctx.temperature)).to(ctx.dtype)
                if wants_hidden:
                    grad_hidden[chunk] = (grad @ matrix).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad.T @ hidden[chunk].to(ctx.dtype)
        in_weight_dtype = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden if wants_hidden else None, in_weight_dtype, None, None, None, None


def _chunks(length: int, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, length, rows)]


def _logits(hidden: Tensor, matrix: Tensor, temperature: float) -> Tensor:
    """``[rows, V]`` logits in float32."""
    return (hidden.to(matrix.dtype) @ matrix.T).float() / temperature
