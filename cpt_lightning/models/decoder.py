"""The decoder layer of Qwen2.5-VL with a pattern for its attention, and no more work than what is asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLTextModel

from cpt_lightning.models.attention import Pattern
from cpt_lightning.models.norms import use_fast_norms

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

FEW_TOKENS = 128
"""Up to so many the weights are the long side of a product."""


def use_patterns(model: QwenVL) -> None:
    """Makes the decoder layers ask patterns; where none is given the model does what it always does."""
    layers = model.model.language_model.layers
    if not isinstance(layers[0], PatternLayer):
        for layer in layers:
            layer.__class__ = PatternLayer  # the same weights, hooks and checkpointing, another forward
        use_fast_norms(model.model.language_model)


def decode(language_model: Qwen2_5_VLTextModel, embeds: Tensor, positions: Tensor, pattern: Pattern) -> Tensor:
    """``[1, N, H]`` final hidden states of one token more of each completion, from embeddings of that shape.

    Layers are called without their hooks. FSDP2's would wait for streams at every layer of every token, which no CUDA
    graph may, for weights that are gathered as long as tokens are sampled (see sharding.py).

    Args:
        language_model: Its layers ask patterns.
        embeds: ``[1, N, H]``.
        positions: ``[3, 1, N]`` M-RoPE positions.
        pattern: A step of sampling.
    """
    angles = language_model.rotary_emb(embeds, positions)
    hidden = embeds
    for layer in language_model.layers:
        hidden = layer.forward(hidden, pattern, angles)
    return language_model.norm(hidden)


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
        inputs = self.input_layernorm(hidden_states)
        angles = _angles_of(pattern, position_embeddings)
        wanted = pattern.wanted if self._is_last else None
        if wanted is None:
            heads = self._attend(pattern, inputs, inputs, angles, angles)
        else:
            asking = (inputs.index_select(1, wanted), tuple(x[:, wanted] for x in angles))
            heads = self._attend(pattern, asking[0], inputs, asking[1], angles)
            hidden_states = hidden_states.index_select(1, wanted)
        hidden_states = hidden_states + _projected(pattern, heads, self.self_attn.o_proj)
        return hidden_states + self._mlp(pattern, self.post_attention_layernorm(hidden_states))

    def _mlp(self, pattern: Pattern, hidden: Tensor) -> Tensor:
        mlp = self.mlp
        gated = mlp.act_fn(_projected(pattern, hidden, mlp.gate_proj)) * _projected(pattern, hidden, mlp.up_proj)
        return _projected(pattern, gated, mlp.down_proj)

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
            for projected in (
                _projected(pattern, asking, layer.q_proj),
                _projected(pattern, answering, layer.k_proj),
                _projected(pattern, answering, layer.v_proj),
            )
        )
        # Under autocast the angles are float32, and would make keys so, to be kept and cast again at every token.
        query, key = (
            _rotated(heads, *angles).to(value.dtype)
            for heads, angles in ((query, asking_angles), (key, answering_angles))
        )
        output = pattern.attend(layer.layer_idx, *(x.transpose(1, 2) for x in (query, key, value)))
        return output.transpose(1, 2).flatten(2)


def _projected(pattern: Pattern, hidden: Tensor, layer: nn.Module) -> Tensor:
    """``layer(hidden)``; decoding few tokens on the CPU by the product the other way round, whose long side is shared.

    A layer that is more than a matrix (an adapter's, a quantized one) is left to itself. So are scored tokens: the
    other way round differs in the last bit, and an update's first ratio is 1 only if old log-probabilities do not.
    """
    few = pattern.decoding and hidden.is_cpu and hidden.shape[:-1].numel() <= FEW_TOKENS
    if not few or type(layer) is not nn.Linear or torch.is_autocast_enabled("cpu"):
        return layer(hidden)
    columns = hidden.flatten(0, -2).T
    bias = layer.bias
    product = layer.weight @ columns if bias is None else torch.addmm(bias[:, None], layer.weight, columns)
    return product.T.unflatten(0, hidden.shape[:-1])


def _angles_of(pattern: Pattern, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of a pass, made in its first layer for all of them."""
    cos, sin = position_embeddings
    if pattern.angles is None or pattern.angles[0] is not cos:
        pattern.angles = (cos, _signed(cos, sin))
    return pattern.angles[1]


def _signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, Q, 1, D]`` each, the first half of the sines negated: then a rotation is a roll and two products."""
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(2), torch.cat([-first, second], dim=-1).unsqueeze(2)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[B, Q, heads, D]`` turned by its M-RoPE position."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)
