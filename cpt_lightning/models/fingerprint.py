"""Tells one set of weights from another without reading all of it."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

VALUES = 64
"""How many values of each weight are looked at."""


def frozen_fingerprint(model: QwenVL) -> str | None:
    """Of the frozen weights alone, see :func:`model_fingerprint`."""
    return _fingerprint((name, weight) for name, weight in model.named_parameters() if not weight.requires_grad)


def model_fingerprint(model: QwenVL) -> str | None:
    """Equal for equal weights: 16 hexadecimal digits from names, shapes, precisions and some values of each.

    ``None`` where this process does not hold the weights themselves, because they are sharded or not loaded yet.
    """
    return _fingerprint(model.named_parameters())


def _fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    digest = blake2b(digest_size=8)
    for name, weight in sorted(weights, key=lambda pair: pair[0]):
        if weight.is_meta or type(weight.data) is not torch.Tensor:
            return None
        places = torch.linspace(0, weight.numel() - 1, VALUES).long()
        values = weight.detach().flatten()[places.to(weight.device)].contiguous().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
