"""Bytes of tensors that live at once, while code runs on real tensors or on meta ones that hold no data.

A plan of memory is the engine's own code run on meta weights: what is kept for backward, and for how long, is then
not a formula that goes stale. Lengths and masks stay real, because the code asks them for sizes.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations make inside it, until it is freed.

    An operation on real tensors and meta ones is done on the meta device: small tensors of lengths and positions meet
    weights that hold no data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operation and counts the storages that it made."""
        kwargs = kwargs or {}
        known = tree_leaves((args, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in known):
            args, kwargs = tree_map_only(Tensor, _as_meta, (args, kwargs))
            kwargs = {**kwargs, "device": torch.device("meta")} if kwargs.get("device") else kwargs
        output = func(*args, **kwargs)
        given = {leaf.untyped_storage()._cdata for leaf in known if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size


def _as_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def weight_bytes(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Bytes of a model's parameters, each once though it may have two names; of meta parameters too."""
    parameters = (p for p in model.parameters() if p.requires_grad or not trainable_only)
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
