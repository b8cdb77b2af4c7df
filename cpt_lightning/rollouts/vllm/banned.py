"""Tokens that vLLM must never draw, whatever their logits are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class BannedTokens(LogitsProcessor):
    """Rules tokens out of all completions; not by a bias, which vLLM bounds to -100.

    Args:
        vllm_config: Whose ``additional_config`` names them.
        device: Of the logits.
        is_pin_memory: As vLLM passes it.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.banned = torch.tensor(vllm_config.additional_config["banned_token_ids"], device=device)

    def apply(self, logits: Tensor) -> Tensor:
        """``[requests, V]`` logits without them."""
        return logits.index_fill_(1, self.banned, -torch.inf)

    def is_argmax_invariant(self) -> bool:
        """Not: a greedy completion must not take them either."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Nothing: they are the same for all."""
