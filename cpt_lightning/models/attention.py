"""Attention patterns of our own inside the transformers model: who may look at whom is an object, not a mask.

A dense mask over a packed row costs the square of its length, although a completion looks at its prompt and itself
only. Here every attention layer hands its queries, keys and values to the pattern, which computes just what is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

PATTERN = "pattern"
"""Attention of the language model: a pattern where one is given, else that of transformers."""

WINDOWS = "windows_like_flash"
"""Attention of the vision tower. With "flash" in its name transformers hands over all windows at once."""


class Pattern(Protocol):
    """Computes the attention of one layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[B, heads, Q, D]`` from queries of that shape and new keys and values ``[B, kv_heads, Q, D]``."""
        ...


@dataclass
class DenseMask:
    """The plain pattern: any token may see any other that the mask allows it to.

    Args:
        allowed: ``[B, 1, Q, Q]`` bool, true where a query may look at a key; every query needs one key.
    """

    allowed: Tensor

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Scaled dot-product attention under the mask."""
        return attention(query, key, value, attn_mask=self.allowed, enable_gqa=True)


def use_patterns(model: QwenVL) -> None:
    """Makes the attention layers ask patterns; where none is given the model does what it always does."""
    model.model.language_model.config._attn_implementation = PATTERN
    model.model.visual.config._attn_implementation = WINDOWS


def _pattern_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Pattern | Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """What a layer of the language model calls; the mask that it passes on may be a pattern."""
    if attention_mask is None or isinstance(attention_mask, Tensor):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return attention_mask.attend(module.layer_idx, query, key, value).transpose(1, 2), None


def _window_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    cu_seq_lens_q: Tensor,
    **kwargs,
) -> tuple[Tensor, None]:
    """Full attention within each window ``cu[i]:cu[i + 1]`` of the only row; windows of one size are one batch."""
    lengths = cu_seq_lens_q.diff()
    sizes = lengths.unique().tolist()
    outputs, places = [], []
    for size in sizes:
        # [windows, size] places of the tokens of all windows of this size
        place = cu_seq_lens_q[:-1][lengths == size, None] + torch.arange(size, device=lengths.device)
        batch = (x[0, :, place].transpose(0, 1) if len(sizes) > 1 else _cut(x, size) for x in (query, key, value))
        outputs.append(attention(*batch).transpose(1, 2).flatten(0, 1))
        places.append(place.flatten())
    if len(sizes) == 1:
        return outputs[0].unsqueeze(0), None
    output = torch.cat(outputs)
    return output.new_empty(output.shape).index_copy(0, torch.cat(places), output).unsqueeze(0), None


def _cut(row: Tensor, size: int) -> Tensor:
    """``[windows, heads, size, D]`` from ``[1, heads, windows * size, D]``."""
    return row[0].unflatten(1, (-1, size)).transpose(0, 1)


AttentionInterface.register(PATTERN, _pattern_attention)
AttentionMaskInterface.register(PATTERN, sdpa_mask)
AttentionInterface.register(WINDOWS, _window_attention)
