"""What training has done to each weight; with LoRA to the weight that an adapter adds to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lightning import LightningModule
from torch import Tensor

from cpt_lightning.models.adapted_layers import LowRankLayer, low_rank_layers
from cpt_lightning.models.adapters import has_adapters
from cpt_lightning.models.sharding import whole
from cpt_lightning.models.weights import Weights, trained


@dataclass
class Change:
    """A trained weight, whole, before and now; with LoRA the weight that the adapter adds to.

    Args:
        name: Of the parameter, or of the layer with an adapter.
        before: As it was.
        now: Now.
        by: What it has changed by; with LoRA more exact than the difference of the two.
    """

    name: str
    before: Tensor
    now: Tensor
    by: Tensor


def changes_since(module: LightningModule, start: Weights) -> Iterator[Change]:
    """One after the other, so that only one is whole where they are in shards; all ranks must ask.

    Args:
        module: Whose weights they are.
        start: A copy of what is trained, as it was.

    Raises:
        ValueError: An adapter is not one of LoRA on linear layers.
    """
    now = trained(module)
    if not has_adapters(module.model):
        for name, weight in now.items():
            one, other = whole(start[name]).float(), whole(weight).float()
            yield Change(name, one, other, other - one)
        return
    for layer in low_rank_layers(module.model):
        frozen = whole(layer.frozen).float()
        one, other = _product(layer, start), _product(layer, now)
        yield Change(f"model.{layer.name}", frozen + one, frozen + other, other - one)


def _product(layer: LowRankLayer, weights: Mapping[str, Tensor]) -> Tensor:
    """What an adapter adds to its layer's weight."""
    a, b = (whole(weights[f"model.{name}"]).float() for name in (layer.a, layer.b))
    return layer.scale * (b @ a)
