"""Weights on their way to another engine: which they are now, in buckets through shared memory, and if they came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cpt_lightning.models.adapted_layers import plain_weights
from cpt_lightning.models.sharding import whole

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

LANGUAGE = ("model.language_model.", "lm_head.")
"""Beginnings of the names of what an engine needs: image features are computed here."""
ALIGNED = 16
"""Bytes to a multiple of which a tensor begins in a bucket, so that it can be looked at in any precision."""
COLUMNS = 2
"""Of each matrix, that are read back."""


@dataclass
class Place:
    """Where a tensor lies in a bucket.

    Args:
        name: As in a checkpoint.
        shape: Of the tensor.
        dtype: Of the tensor.
        start: First byte.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.start + torch.Size(self.shape).numel() * self.dtype.itemsize


def language_weights(model: QwenVL, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The language model's weights one after another, adapters merged, under the names of a checkpoint.

    Args:
        model: The backbone. In shards that are gathered, every rank has all of it; of shards that are not, the whole is
            gathered tensor by tensor, which every rank must ask for.
        dtype: That the engine wants them in.
    """
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        for name, weight in plain_weights(model, LANGUAGE):
            yield name, whole(weight).to(dtype)


def fingerprint(module: nn.Module) -> list[int]:
    """Changes whenever a weight does, however that came about; reads all of them, and keeps none.

    Of the bits of each weight it sums rows and columns, weighted by their places, modulo 2^64.
    """
    sums = []
    for weight in module.parameters():
        bits = _bits(whole(weight).detach())
        for dim in (0, 1):
            totals = bits.sum(dim=dim, dtype=torch.int64)
            sums.append((totals * torch.arange(1, len(totals) + 1, device=totals.device)).sum())
    return torch.stack(sums).tolist() if sums else []


def _bits(weight: Tensor) -> Tensor:
    """``[rows, columns]`` integers."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return weight.contiguous().view(integers).reshape(-1, weight.shape[-1] if weight.dim() else 1)


def checksum(data: Tensor) -> int:
    """Of bytes, by value and place."""
    blocks = data[: len(data) // 8 * 8].view(torch.int64)
    odd = torch.arange(len(blocks)) * 2 + 1
    return int((blocks * odd).sum()) ^ int(data[len(data) // 8 * 8 :].sum())


def buckets(weights: Iterable[tuple[str, Tensor]], buffer: Tensor) -> Iterator[list[Place]]:
    """Lays weights into the buffer until it is full; what lies there may be overwritten once the next is asked for.

    Args:
        weights: By name.
        buffer: ``[bytes]``, with room for the largest of them.
    """
    places: list[Place] = []
    end = 0
    for name, weight in weights:
        place = Place(name, tuple(weight.shape), weight.dtype, -(-end // ALIGNED) * ALIGNED)
        if place.end > len(buffer):
            yield places
            places, place = [], Place(name, place.shape, place.dtype, 0)
        buffer[end : place.start] = 0
        unpack(buffer, place).copy_(weight)
        places.append(place)
        end = place.end
    if places:
        yield places


def unpack(buffer: Tensor, place: Place) -> Tensor:
    """The tensor that lies there."""
    return buffer[place.start : place.end].view(place.dtype).view(place.shape)


def looked_at(name: str, weight: Tensor, columns: list[int]) -> Tensor:
    """What an engine's ``read_back`` must give for a weight: columns of a matrix, rows of the embeddings, a vector."""
    part = weight if weight.dim() == 1 else weight[columns] if "embed_tokens" in name else weight[:, columns]
    return part.float().cpu()


def differing(sent: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Weights that were sent and are not found as they were sent."""
    return [name for name, part in sent.items() if name not in found or not torch.equal(part, found[name])]
