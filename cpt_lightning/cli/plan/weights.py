"""What stands in memory whatever a device computes: a model without weights, and bytes of those it will have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cpt_lightning.cli.plan.devices import Devices
from cpt_lightning.models import Backbone
from cpt_lightning.models.memory import LiveBytes, weight_bytes
from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.modules import PostTraining
from cpt_lightning.types import Prompts

PROBE = 2**16
"""Weights on which an optimizer is tried; of fewer, eight-bit ones keep 32 bits."""


@dataclass
class OptimizerCost:
    """Bytes of an optimizer for each weight that it updates.

    Args:
        state: That it keeps.
        step: That it needs beside them during a step.
    """

    state: float
    step: float

    @classmethod
    def of(cls, module: PostTraining, dtype: torch.dtype, foreach: bool) -> OptimizerCost:
        """Found by a step of the real optimizer on a few weights."""
        weight = nn.Parameter(torch.zeros(PROBE, dtype=dtype))
        optimizer = module.make_optimizer([weight])
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = foreach
        weight.grad = torch.zeros_like(weight)
        with LiveBytes() as live:
            optimizer.step()
        state = storage_bytes(_tensors(optimizer.state[weight]))
        return cls(state / PROBE, max(0, live.peak - state) / PROBE)


def weightless_model(backbone: Backbone, devices: Devices) -> QwenVL:
    """The model on the meta device, tuned as it will be; four-bit layers stand there in the dtype of the others."""
    if backbone.tuning == "qlora":
        backbone = replace(backbone, tuning="lora")
    model = backbone.load_model(on_meta=True)
    return model.to(torch.bfloat16) if devices.precision == "bf16-true" else model


def stored_bytes(model: QwenVL, backbone: Backbone) -> int:
    """Bytes of the weights as they are kept."""
    if backbone.tuning != "qlora":
        return weight_bytes(model)
    layers = model.model.language_model.layers.named_parameters()
    packed = [weight for name, weight in layers if weight.dim() == 2 and "lora_" not in name]
    saved = sum(weight.numel() * (weight.element_size() - backbone.quantization.bytes_per_weight) for weight in packed)
    return int(weight_bytes(model) - saved)


def bytes_of(weights: Sequence[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(weight.numel() * weight.element_size() for weight in weights)


def pixel_bytes(prompts: Prompts) -> int:
    """Bytes of the images of a batch."""
    return 0 if prompts.pixel_values is None else prompts.pixel_values.nbytes


def _tensors(state: dict) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1]


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the memory behind tensors, each once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
