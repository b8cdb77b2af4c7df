"""The backbone in shards (FSDP2): every rank keeps a part of each weight, and all ranks gather the whole of it at once.

Ranks do not do the same work: one has images and another text alone, completions differ in length, groups without a
signal cost no forward. If every block gathered its own weights whenever it runs, as FSDP2 does by default, ranks would
wait for each other for ever. So what is exchanged does not depend on the work: all weights are gathered before it, and
nothing is while tokens are sampled. Gradients are summed up when a backward pass is through; those of the language
model, which every rank goes back through whatever its rows are, as soon as each block has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from cpt_lightning.models.decoder import use_patterns
from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.models.vision import use_fast_vision

BLOCK_BY_BLOCK = "_exchanges_block_by_block"
"""Names the note on a sharded model of whether decoder layers exchange gradients as they come."""


def backbones_of(module: nn.Module) -> list[QwenVL]:
    """The models inside a module, references included."""
    return [part for part in module.modules() if isinstance(part, Qwen2_5_VLForConditionalGeneration)]


def trained_backbones(module: nn.Module) -> list[QwenVL]:
    """Those of them that are trained."""
    return [model for model in backbones_of(module) if any(weight.requires_grad for weight in model.parameters())]


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's weights are spread over ranks."""
    return isinstance(module, FSDPModule)


@contextmanager
def sharded_left_out(module: nn.Module) -> Iterator[None]:
    """The module without its sharded parts, so that all the rest can be moved; they come back to their places."""
    places = [
        (parent, name)
        for parent in module.modules()
        for name, part in parent._modules.items()
        if part is not None and is_sharded(part) and not is_sharded(parent)
    ]
    parts = [parent._modules[name] for parent, name in places]
    for parent, name in places:
        parent._modules[name] = None  # not deleted: the order of parts is that of an optimizer's state
    try:
        yield
    finally:
        for (parent, name), part in zip(places, parts, strict=True):
            parent._modules[name] = part


def shard(model: QwenVL, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None, cpu_offload: bool = False) -> None:
    """Spreads a model over ranks, in place: rank 0 has the weights, the others may have built it on the meta device.

    Args:
        model: The backbone, with its adapters.
        mesh: All ranks, in one dimension.
        compute_dtype: What weights are gathered in, if not in their own; gradients are then summed up in float32.
        cpu_offload: Keep the shards of weights, gradients and optimizer in main memory.
    """
    # Before sharding: both change a module's class, and FSDP2 derives its own from what it finds.
    use_patterns(model)
    use_fast_vision(model)
    weights = model.state_dict() if dist.get_rank() == 0 else {}
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=compute_dtype and torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available()) if cpu_offload else OffloadPolicy()
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    _keep_gathered(model)
    device = _device_of(mesh)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device="cpu" if cpu_offload else device)
        model.tie_weights()
    everything = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=everything)
    _share_buffers(model, buffers, device)


def gather(model: nn.Module) -> None:
    """Gathers all weights on every rank, unless they are; every rank must call it, whatever it will do with them."""
    if isinstance(model, FSDPModule):
        _touch(model)  # a forward of the whole model comes first, or a block would take itself for the whole
        for block in _blocks(model):
            block.unshard()


def release(model: nn.Module) -> None:
    """Leaves every rank its shards alone, which optimizer and checkpoints work on."""
    if isinstance(model, FSDPModule):
        for block in _blocks(model):
            block.reshard()


def exchange_block_by_block(model: nn.Module, wanted: bool) -> None:
    """Whether decoder layers exchange their gradients within each backward pass, so that no rank holds them all.

    Then every rank must go back through the language model equally often. Otherwise, and in the vision tower, the
    embeddings and the output layer, gradients wait for :func:`exchange_gradients`.
    """
    if isinstance(model, FSDPModule):
        setattr(model, BLOCK_BY_BLOCK, wanted)
        _exchange_later(model)


@contextmanager
def exchanging_block_by_block(models: Iterable[nn.Module]) -> Iterator[None]:
    """Decoder layers exchange their gradients within each backward pass, for as long as all ranks go back alike."""
    before = [(model, getattr(model, BLOCK_BY_BLOCK, False)) for model in models]
    for model, _ in before:
        exchange_block_by_block(model, True)
    yield
    for model, wanted in before:
        exchange_block_by_block(model, wanted)


def exchange_gradients(model: nn.Module) -> None:
    """Averages over ranks the gradients of all backward passes since the last time, and leaves each its shards.

    Every rank must have a gradient of the same weights, see :func:`unsteady`.
    """
    if not isinstance(model, FSDPModule):
        return
    gather(model)
    model.set_requires_gradient_sync(True)
    # FSDP2 exchanges at the end of a backward pass: here of one through next to nothing, the same on all ranks.
    with torch.enable_grad():
        _touch(model).backward()
    _exchange_later(model)
    release(model)


def unsteady(model: QwenVL) -> list[nn.Parameter]:
    """Trained weights that a backward pass may leave out on one rank alone: all but those of decoder layers."""
    steady = {id(weight) for weight in model.model.language_model.layers.parameters()}
    return [weight for weight in model.parameters() if weight.requires_grad and id(weight) not in steady]


def whole(tensor: Any) -> Any:
    """The whole of a tensor that may be a shard; every rank must ask. Anything else is what it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that may be a shard; nothing is exchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def all_whole(tensors: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """The whole of each shard, in main memory, on the ranks that keep them; every rank must ask."""
    kept = {}
    for name, value in tensors.items():
        gathered = whole(value)  # one at a time, so that no rank holds all of them
        if keep:
            kept[name] = value if gathered is value else gathered.cpu()
    return kept


def like_shard(value: Any, shard_: Any) -> Any:
    """The part of a whole tensor that belongs with a shard; nothing is exchanged."""
    if not isinstance(shard_, DTensor) or isinstance(value, DTensor):
        return value
    local = value.to(shard_.to_local().device)
    return distribute_tensor(local, shard_.device_mesh, shard_.placements, src_data_rank=None)


def like_shards(weights: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The part of whole weights that belongs to this rank."""
    shards = module.state_dict()
    return {name: like_shard(value, shards.get(name)) for name, value in weights.items()}


def _blocks(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _decoder_layers(model: QwenVL) -> Iterator[FSDPModule]:
    return iter(model.model.language_model.layers)


def _keep_gathered(model: QwenVL) -> None:
    """Makes FSDP2 gather and exchange when it is told to, at no other time."""
    for block in _blocks(model):
        block.set_reshard_after_forward(False, recurse=False)
        block.set_reshard_after_backward(False, recurse=False)
    exchange_block_by_block(model, False)
    model._nothing = lambda: _nothing(model)
    register_fsdp_forward_method(model, "_nothing")


def _exchange_later(model: QwenVL) -> None:
    """Lets gradients wait, but for those that are exchanged block by block."""
    model.set_requires_gradient_sync(False)
    for layer in _decoder_layers(model):
        layer.set_requires_gradient_sync(getattr(model, BLOCK_BY_BLOCK))


def _touch(model: nn.Module) -> Tensor:
    """A forward of the whole model, to FSDP2, that yields 0."""
    return cast(Callable[[], Tensor], model._nothing)()


def _nothing(model: QwenVL) -> Tensor:
    """0, by way of the smallest weight that every rank trains and uses."""
    # Its gradient meets no one else's that is missing: FSDP2 (torch 2.13) would not take their dtypes together.
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    used = [weight for weight in model.model.language_model.layers.parameters() if weight.requires_grad]
    smallest = min(used or trainable, key=Tensor.numel, default=None)
    return torch.zeros(()) if smallest is None else smallest.sum() * 0


def _share_buffers(model: QwenVL, known: Mapping[str, Tensor], device: torch.device) -> None:
    """Gives every rank rank 0's buffers: those of M-RoPE are in no checkpoint, and of no meaning on the meta device."""
    for name, buffer in model.named_buffers():
        shared = known[name].to(device) if name in known else torch.empty_like(buffer, device=device)
        dist.broadcast(shared, src=0)
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, shared)


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())
