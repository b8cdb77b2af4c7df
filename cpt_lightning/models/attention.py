"""Attention patterns of our own inside the transformers model: who may look at whom is an object, not a mask.

A dense mask over a packed row costs the square of its length, although a completion looks at its prompt and itself
only. Here every decoder layer hands its queries, keys and values to a pattern, which computes just what is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention


class Pattern(Protocol):
    """Computes the attention of one layer."""

    wanted: Tensor | None = None
    """``[W]`` places whose final hidden state is wanted, in order; ``None`` wants all."""
    decoding: bool = False
    """Whether this is a step of sampling: few tokens, whose last bits no update has to repeat."""
    angles: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    """The cosines of a pass, and what its layers rotate queries and keys by; made by the first of them."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[B, heads, Q, D]`` from queries of that shape and new keys and values ``[B, kv_heads, Q, D]``.

        In the last layer only the W wanted tokens have a query, and ``[B, heads, W, D]`` is asked for.
        """
        ...


@dataclass
class DenseMask(Pattern):
    """The plain pattern: any token may see any other that the mask allows it to.

    Args:
        allowed: ``[B, 1, Q, Q]`` bool, true where a query may look at a key; every query needs one key.
    """

    allowed: Tensor

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
