"""Log-probabilities of given tokens without ever holding the logits of all positions.

With Qwen's vocabulary of 151,936 the logits of 4,096 positions are 2.5 GB in float32, and softmax and backward want
several of them. Here logits exist for one chunk of positions at a time, in buffers that all chunks share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**24
"""Logits held at once (64 MB in float32)."""
ROWS_PER_WIDTH = 1 / 4
"""Positions held at once at least, as a share of the hidden size: about half the memory of the matrix's gradient, whose
sum every chunk reads and writes, and enough products for each reading of the matrix."""


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk_logits: int | None = None
) -> Tensor:
    """Log-probability of each target token.

    If the output matrix is trained, backward computes the logits again. If it is not (LoRA), forward computes the
    gradient of each log-probability along with it, ``weight[target] - softmax @ weight``, and backward only scales it.

    Args:
        hidden: ``[M, H]`` hidden states that predict the targets.
        weight: ``[V, H]`` output matrix.
        targets: ``[M]`` token ids.
        temperature: Divides the logits.
        chunk_logits: How many logits may exist at once; by default ``CHUNK_LOGITS``, of wide models more.

    Returns:
        ``[M]`` log-probabilities in nats (float32, differentiable in ``hidden`` and ``weight``).

    Raises:
        ValueError: A temperature of 0 or less.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; what was drawn greedily is scored with 1")
    device = "cpu" if hidden.is_meta else hidden.device.type  # autocast knows no meta device
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    with torch.autocast(device, enabled=False):
        scaled = hidden.to(dtype) / temperature if temperature != 1.0 else hidden.to(dtype)
        return _TokenLogprobs.apply(scaled, weight.to(dtype), targets, _chunk_rows(weight, chunk_logits))


def _chunk_rows(weight: Tensor, chunk_logits: int | None) -> int:
    """How many positions a chunk has."""
    num_logits, width = weight.shape
    if chunk_logits is None:
        return max(CHUNK_LOGITS // num_logits, int(width * ROWS_PER_WIDTH))
    return max(1, chunk_logits // num_logits)


class _TokenLogprobs(torch.autograd.Function):
    """Log-softmax at the targets, chunk by chunk.

    For y = log softmax(W h)[t]: dy/dh = W[t] - p W and dy/dW = (onehot(t) - p) h', with p = softmax(W h).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, rows):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if wants_hidden and not wants_weight else None
        for chunk, log_softmax in _softmax_chunks(torch.log_softmax, hidden, weight, rows):
            target = targets[chunk]
            logps[chunk] = log_softmax.gather(1, target[:, None]).squeeze(1)
            if slopes is not None:
                slopes[chunk] = weight[target] - log_softmax.exp_().to(weight.dtype) @ weight
        ctx.save_for_backward(*([hidden, weight, targets] if slopes is None else [slopes]))
        ctx.rows = rows
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if len(ctx.saved_tensors) == 1:
            return ctx.saved_tensors[0] * grad[:, None].to(ctx.saved_tensors[0].dtype), None, None, None
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        weighted = hidden * grad[:, None].to(hidden.dtype)
        for chunk, softmax in _softmax_chunks(torch.softmax, hidden, weight, ctx.rows):
            # In place of onehot - p its negative, so that p itself is used up.
            residual = softmax.scatter_add_(1, targets[chunk, None], softmax.new_full((len(softmax), 1), -1.0))
            residual = residual.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = (residual @ weight) * -grad[chunk, None].to(weight.dtype)
            _subtract_product(grad_weight, residual.T, weighted[chunk])
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _softmax_chunks(softmax, hidden: Tensor, weight: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """For every chunk of positions its ``[rows, V]`` (log-)softmax in float32, in a buffer that the next one reuses."""
    logits = hidden.new_empty(min(rows, len(hidden)), len(weight))
    normalized = torch.empty_like(logits, dtype=torch.float32)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, min(start + rows, len(hidden)))
        here = slice(0, chunk.stop - start)
        torch.mm(hidden[chunk], weight.T, out=logits[here])
        yield chunk, softmax(logits[here].float(), dim=-1, out=normalized[here])


def _subtract_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total -= left @ right``, in place where the dtypes allow it: a product of [V, H] is no small thing."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=-1)
    else:
        total -= left @ right
