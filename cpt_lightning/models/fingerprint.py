"""Tells one backbone from another without reading all of it."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cpt_lightning.models.sharding import release, whole

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

VALUES = 64
"""How many values of each weight are looked at."""


def frozen_fingerprint(model: QwenVL) -> str | None:
    """Of the frozen weights alone, see :func:`model_fingerprint`.

    ``None`` where this process does not hold the weights themselves, because they are sharded or not loaded yet.
    """
    frozen = [(name, weight) for name, weight in sorted(model.named_parameters()) if not weight.requires_grad]
    if any(weight.is_meta or type(weight.data) is not Tensor for _, weight in frozen):
        return None
    return _digest(frozen)


def model_fingerprint(model: nn.Module) -> str:
    """Equal for equal weights: 16 hexadecimal digits from names, shapes, precisions and some values of each.

    Where they are sharded, every rank must ask.
    """
    release(model)
    return _digest((name, whole(weight)) for name, weight in sorted(model.named_parameters()))


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = blake2b(digest_size=8)
    for name, weight in weights:
        # float32 would round the last place of a large weight to one behind its end.
        places = torch.linspace(0, weight.numel() - 1, VALUES, dtype=torch.float64).long()
        values = weight.detach().flatten()[places.to(weight.device)].contiguous().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
