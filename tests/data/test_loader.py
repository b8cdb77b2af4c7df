"""Batches on their way to a device."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from tests.training import with_examples


def tensors_of(part: Any) -> list[Tensor]:
    """All tensors of a batch."""
    if isinstance(part, Tensor):
        return [part]
    return [t for field in fields(part) for t in tensors_of(getattr(part, field.name))] if is_dataclass(part) else []


def test_what_a_loader_pins_is_every_tensor_of_a_batch(monkeypatch, mixed_prompts, processor):
    """Without a GPU there is nothing to pin for: a stand-in marks what it is asked to."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = with_examples(mixed_prompts, processor)
    batch.prompts.valid = torch.zeros(len(batch), dtype=torch.long)
    before, after = tensors_of(batch), tensors_of(batch.pin_memory())
    assert len(before) == len(after) == 7
    for tensor, pinned in zip(before, after, strict=True):
        assert torch.equal(pinned, tensor + 1)
