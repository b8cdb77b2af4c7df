"""What is done around a model in shards; shards themselves are for ``test_sharded`` and two processes."""

from __future__ import annotations

import torch
from torch import nn

from cpt_lightning.models import sharding
from cpt_lightning.models.sharding import sharded_left_out


def test_all_but_what_is_sharded_is_moved_and_parts_keep_their_order(monkeypatch):
    """With shards in main memory: the rest of a module goes to the device, and an optimizer finds the same order."""
    module, holder = nn.Module(), nn.Module()
    holder.copy, holder.note = nn.Linear(2, 2), nn.Linear(2, 2)
    module.model, module.holder, module.sums = nn.Linear(2, 2), holder, nn.Linear(2, 2)
    names = [name for name, _ in module.named_parameters()]
    monkeypatch.setattr(sharding, "is_sharded", lambda part: part in (module.model, holder.copy))
    with sharded_left_out(module):
        module.to("meta")
    assert [name for name, _ in module.named_parameters()] == names
    moved = {name for name, parameter in module.named_parameters() if parameter.is_meta}
    assert moved == {"holder.note.weight", "holder.note.bias", "sums.weight", "sums.bias"}
    assert isinstance(module.model.weight, torch.Tensor) and not module.model.weight.is_meta
