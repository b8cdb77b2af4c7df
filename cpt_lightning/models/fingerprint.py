"""Tells one frozen backbone from another without reading all of it."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

VALUES = 64
"""How many values of each weight are looked at."""


def frozen_fingerprint(model: QwenVL) -> str | None:
    """Equal for equal frozen weights: 16 hexadecimal digits from names, shapes, precisions and some values of each.

    ``None`` where this process does not hold the weights themselves, because they are sharded or not loaded yet.
    """
    digest = blake2b(digest_size=8)
    for name, weight in sorted(model.named_parameters()):
        if weight.requires_grad:
            continue
        if weight.is_meta or type(weight.data) is not torch.Tensor:
            return None
        places = torch.linspace(0, weight.numel() - 1, VALUES).long()
        values = weight.detach().flatten()[places.to(weight.device)].contiguous().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
