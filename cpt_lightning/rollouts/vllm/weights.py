"""Weights on their way to another engine: which they are now, in buckets through shared memory, and if they came."""

from __future__ import annotations

import os
import weakref
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


@dataclass
class Part:
    """What one of an engine's workers computes with of a weight that is looked at.

    Args:
        name: As in a checkpoint.
        row: First of its rows, among all.
        column: First of its columns, among those that are looked at.
        values: ``[rows, columns]``, or ``[rows]`` of a vector.
    """

    name: str
    row: int
    column: int
    values: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """The same part of all that is looked at."""
        rows = whole[self.row : self.row + len(self.values)]
        return rows if rows.dim() == 1 else rows[:, self.column : self.column + self.values.shape[1]]


def shared_buffer(size: int) -> tuple[Tensor, str]:
    """``[bytes]`` of memory, and the path by which other processes open it as long as this one keeps it.

    No file has to be removed: it is gone when the last process that has opened it is.
    """
    number = os.memfd_create("weights")
    os.ftruncate(number, size)
    path = f"/proc/{os.getpid()}/fd/{number}"
    buffer = open_buffer(path)
    weakref.finalize(buffer, os.close, number)
    return buffer, path


def open_buffer(path: str) -> Tensor:
    """``[bytes]`` of the memory of another process."""
    return torch.from_file(path, shared=True, size=os.stat(path).st_size, dtype=torch.uint8)


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


def edges(size: int, num_shares: int) -> list[int]:
    """The first and the last of each share, when so many are divided evenly: ``edges(8, 2)`` is ``[0, 3, 4, 7]``."""
    share = size // num_shares
    return [place for end in range(share, num_shares * share + 1, share) for place in (end - share, end - 1)]


def looked_at(name: str, weight: Tensor, num_shares: int) -> Tensor:
    """What is read back of a weight: columns of a matrix, rows of the embeddings, all of a vector.

    Args:
        name: Of the weight.
        weight: The whole of it.
        num_shares: In how many it is divided, in whichever dimension: something of each is looked at.
    """
    if weight.dim() > 1:
        weight = (
            weight[edges(len(weight), num_shares)]
            if "embed_tokens" in name
            else (weight[:, edges(weight.shape[1], num_shares)])
        )
    return weight.float().cpu()


def differing(sent: Mapping[str, Tensor], found: Iterable[Part]) -> list[str]:
    """Weights of which some worker has not what was sent, or no worker has some."""
    wrong = set()
    missing = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in sent.items()}
    for part in found:
        if part.name in sent:
            part.of(missing[part.name]).fill_(False)
            if not torch.equal(part.of(sent[part.name]), part.values):
                wrong.add(part.name)
    return [name for name in sent if name in wrong or missing[name].any()]
