"""The decoder layer of Qwen2.5-VL with a pattern for its attention, and no more work than what is asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLRMSNorm

from cpt_lightning.models.attention import Pattern

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL


def use_patterns(model: QwenVL) -> None:
    """Makes the decoder layers ask patterns; where none is given the model does what it always does."""
    layers = model.model.language_model.layers
    if not isinstance(layers[0], PatternLayer):
        for layer in layers:
            layer.__class__ = PatternLayer  # the same weights, hooks and checkpointing, another forward


class PatternLayer(Qwen2_5_VLDecoderLayer):
    """A decoder layer whose attention mask may be a :class:`Pattern`.

    In the last layer only keys and values of all tokens are needed; queries, output projection and MLP are run for the
    tokens whose hidden state is wanted. Of a prompt that is one.
    """

    def forward(self, hidden_states: Tensor, attention_mask=None, position_embeddings=None, **kwargs) -> Tensor:
        """``[B, Q, H]`` from ``[B, Q, H]``; in the last layer ``[B, W, H]`` where the pattern wants W tokens."""
        if attention_mask is None or isinstance(attention_mask, Tensor):
            return super().forward(
                hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
            )
        pattern: Pattern = attention_mask
        inputs = _normalized(hidden_states, self.input_layernorm)
        angles = _signed(*position_embeddings)
        wanted = pattern.wanted if self._is_last else None
        if wanted is None:
            heads = self._attend(pattern, inputs, inputs, angles, angles)
        else:
            asking = (inputs.index_select(1, wanted), tuple(x[:, wanted] for x in angles))
            heads = self._attend(pattern, asking[0], inputs, asking[1], angles)
            hidden_states = hidden_states.index_select(1, wanted)
        hidden_states = hidden_states + self.self_attn.o_proj(heads)
        return hidden_states + self.mlp(_normalized(hidden_states, self.post_attention_layernorm))

    @property
    def _is_last(self) -> bool:
        return self.self_attn.layer_idx == self.self_attn.config.num_hidden_layers - 1

    def _attend(
        self,
        pattern: Pattern,
        asking: Tensor,
        answering: Tensor,
        asking_angles: tuple[Tensor, ...],
        answering_angles: tuple[Tensor, ...],
    ) -> Tensor:
        """``[B, W, heads * D]`` for W asking tokens, from the keys and values of Q answering ones."""
        layer = self.self_attn
        query, key, value = (
            projected.unflatten(-1, (-1, layer.head_dim))
            for projected in (layer.q_proj(asking), layer.k_proj(answering), layer.v_proj(answering))
        )
        query, key = _rotated(query, *asking_angles), _rotated(key, *answering_angles)
        output = pattern.attend(layer.layer_idx, *(x.transpose(1, 2) for x in (query, key, value)))
        return output.transpose(1, 2).flatten(2)


def _normalized(hidden: Tensor, norm: Qwen2_5_VLRMSNorm) -> Tensor:
    if hidden.is_cpu and hidden.dtype == torch.float32 and torch.is_grad_enabled():
        return _RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)
    return rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


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


def _signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, Q, 1, D]`` each, the first half of the sines negated: then a rotation is a roll and two products."""
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(2), torch.cat([-first, second], dim=-1).unsqueeze(2)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[B, Q, heads, D]`` turned by its M-RoPE position."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)
