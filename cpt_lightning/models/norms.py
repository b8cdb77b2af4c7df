"""RMSNorm in less time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm


def use_fast_norms(module: nn.Module) -> None:
    """Makes every norm within a module a :class:`FastRMSNorm`."""
    for norm in module.modules():
        if isinstance(norm, Qwen2_5_VLRMSNorm):
            norm.__class__ = FastRMSNorm  # the same weights and hooks, another forward


class FastRMSNorm(Qwen2_5_VLRMSNorm):
    """The same norm by torch's own function, and on the CPU with a backward of its own."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` from ``[..., H]``."""
        if hidden_states.is_cpu and hidden_states.dtype == torch.float32 and torch.is_grad_enabled():
            return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        if hidden_states.dtype != self.weight.dtype:  # autocast: torch's own function would be slow, and says so
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm (Zhang and Sennrich, arXiv 1910.07467) on the CPU, where torch 2.13 takes backward apart into 15 passes.

    With n = x / rms(x) and y = w * n: dx = (g - n * mean(g * n)) / rms(x) for g = w * dy, and dw = sum(dy * n).
    """

    @staticmethod
    def forward(ctx, hidden, weight, epsilon):
        scale = torch.linalg.vecdot(hidden, hidden).div_(hidden.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        normalized = hidden * scale
        ctx.save_for_backward(normalized, weight, scale)
        return normalized * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        normalized, weight, scale = ctx.saved_tensors
        grad_weight = (grad * normalized).flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        mean = torch.linalg.vecdot(grad, normalized).div_(grad.shape[-1]).unsqueeze(-1)
        return torch.addcmul(grad, normalized, mean, value=-1).mul_(scale), grad_weight, None
