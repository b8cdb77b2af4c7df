"""Bytes of tensors that live at once, while code runs on real tensors or on meta ones that hold no data.

A plan of memory is the engine's own code run on meta weights: what is kept for backward, and for how long, is then
not a formula that goes stale. Lengths and masks stay real, because the code asks them for sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


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
        known = list(_tensors((args, *kwargs.values())))
        if any(tensor.is_meta for tensor in known):
            args, kwargs = _mapped(_as_meta, args, kwargs)
            kwargs = {**kwargs, "device": torch.device("meta")} if kwargs.get("device") else kwargs
        output = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in known}
        for tensor in _tensors((output,)):
            if (storage := tensor.untyped_storage())._cdata not in given:
                self._count(storage)
        return output

    def lap(self) -> int:
        """The peak since the last lap; what lives now is where the next one begins."""
        peak, self.peak = self.peak, self.now
        return peak

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


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors of an operation, whose arguments and results are nested in lists and tuples alone.

    Torch's own ``tree_leaves`` (2.13) knows all that may hold a tensor, and takes several times as long.
    """
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _mapped(function: Callable[[Tensor], Tensor], args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments with another tensor in place of each."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        return type(value)(map(mapped, value)) if type(value) in (list, tuple) else value

    return mapped(args), {name: mapped(value) for name, value in kwargs.items()}


def _as_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


class FusedKernels(TorchFunctionMode):
    """Gives meta tensors what real ones have: attention and norms that keep no intermediate results, and autocast.

    Torch (2.13) takes both apart on the meta device, which would keep the square of a sequence's length, and autocast
    does not know it.

    Args:
        autocast: Dtype that products are cast to, if any; each cast is its own, unless autocast is told to keep them.
        cast: Weights that are in that dtype already, as gathered shards are: their casts cost nothing.
    """

    def __init__(self, autocast: torch.dtype | None = None, cast: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.autocast = autocast
        self._casts = {id(weight): weight.to(autocast) for weight in cast} if autocast else {}
        self._kept: dict[int, Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Runs the function, or its fused form."""
        kwargs = kwargs or {}
        if not torch.is_autocast_cache_enabled():
            self._kept.clear()
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return func(*args, **kwargs)
        if self.autocast and func in PRODUCTS:
            args, kwargs = _mapped(self._cast, args, kwargs)
        if func is scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is rms_norm:
            return torch.ops.aten._fused_rms_norm(*args, **kwargs)[0]
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == self.autocast:
            return tensor
        if id(tensor) in self._casts:
            return self._casts[id(tensor)]
        if torch.is_autocast_cache_enabled() and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            return self._kept.setdefault(id(tensor), tensor.to(self.autocast))
        return tensor.to(self.autocast)


PRODUCTS = {linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.addmm, torch.mm}
PRODUCTS |= {scaled_dot_product_attention}
"""Functions whose operands autocast casts."""


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **_: Any):
    """The fused kernel of the CPU, which knows the meta device; a GPU's keeps as much: output and a sum a query."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]


@contextmanager
def counted(autocast: torch.dtype | None = None, cast: Iterable[Tensor] = ()) -> Iterator[LiveBytes]:
    """Counts what the code inside makes of meta tensors, as kernels of a GPU or CPU would.

    Arguments as of :class:`FusedKernels`.
    """
    with ExitStack() as stack:
        if autocast is not None:
            stack.enter_context(torch.autocast("cpu", autocast, cache_enabled=False))  # as Lightning's
        stack.enter_context(FusedKernels(autocast, cast))
        yield stack.enter_context(LiveBytes())


def go_back(loss: Tensor) -> None:
    """Backward, inside :func:`counted`.

    ``loss.backward()`` would switch the fused kernels off for what is computed again: torch does so with any mode while
    it handles one of its own functions.
    """
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def weight_bytes(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Bytes of a model's parameters, each once though it may have two names; of meta parameters too."""
    parameters = (p for p in model.parameters() if p.requires_grad or not trainable_only)
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
