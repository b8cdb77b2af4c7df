"""Attention patterns of our own inside the transformers model: who may look at whom is an object, not a mask.

A dense mask over a packed row costs the square of its length, although a completion looks at its prompt and itself
only. Here every decoder layer hands its queries, keys and values to a pattern, which computes just what is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

WINDOWS = "windows_like_flash"
"""Attention of the vision tower. With "flash" in its name transformers hands over all windows at once."""


class Pattern(Protocol):
    """Computes the attention of one layer."""

    @property
    def wanted(self) -> Tensor | None:
        """``[W]`` places whose final hidden state is wanted, in order; ``None`` wants all."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[B, heads, Q, D]`` from queries of that shape and new keys and values ``[B, kv_heads, Q, D]``.

        In the last layer only the W wanted tokens have a query, and ``[B, heads, W, D]`` is asked for.
        """
        ...


@dataclass
class DenseMask:
    """The plain pattern: any token may see any other that the mask allows it to.

    Args:
        allowed: ``[B, 1, Q, Q]`` bool, true where a query may look at a key; every query needs one key.
    """

    allowed: Tensor
    wanted: None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Scaled dot-product attention under the mask."""
        return attention(query, key, value, attn_mask=self.allowed, enable_gqa=True)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of the last tokens of sequences to all that stands before them, and to themselves.

    Args:
        query: ``[B, heads, Q, D]`` of the last Q of K tokens.
        key: ``[B, kv_heads, K, D]``.
        value: ``[B, kv_heads, K, D]``.

    Returns:
        ``[B, heads, Q, D]``.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == num_keys:
        return attention(query, key, value, is_causal=True, enable_gqa=True)
    # The query heads of one key head become further queries of it: no key is repeated, which a mask would require.
    folded = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    mask = None if num_queries == 1 else _later(num_queries, num_keys, query).repeat(folded.shape[2] // num_queries, 1)
    return attention(folded, key, value, attn_mask=mask).view_as(query)


def _later(num_queries: int, num_keys: int, like: Tensor) -> Tensor:
    """``[Q, K]`` additive mask: minus infinity where a key stands behind the query."""
    return torch.full((num_queries, num_keys), -torch.inf, dtype=like.dtype, device=like.device).triu(
        num_keys - num_queries + 1
    )


def use_window_attention(model: QwenVL) -> None:
    """Makes the vision tower attend within all its windows at once."""
    model.model.visual.config._attn_implementation = WINDOWS


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
        # index_select: the backward of advanced indexing adds up element by element on the CPU.
        rows = (x if len(sizes) == 1 else x.index_select(2, place.flatten()) for x in (query, key, value))
        q, k, v = (_cut(row, size) for row in rows)
        outputs.append(attention(q, k, v).transpose(1, 2).flatten(0, 1))
        places.append(place.flatten())
    if len(sizes) == 1:
        return outputs[0].unsqueeze(0), None
    output = torch.cat(outputs)
    return output.new_empty(output.shape).index_copy(0, torch.cat(places), output).unsqueeze(0), None


def _cut(row: Tensor, size: int) -> Tensor:
    """``[windows, heads, size, D]`` from ``[1, heads, windows * size, D]``."""
    return row[0].unflatten(1, (-1, size)).transpose(0, 1)


AttentionInterface.register(WINDOWS, _window_attention)
