"""Layers with an adapter inside: what they multiply by, and what becomes of both along the stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cpt_lightning.models.adapters import adapter_weights, adapters_replaced

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from cpt_lightning.models.qwen_vl import QwenVL


@dataclass
class LowRankLayer:
    """A linear layer with an adapter: its weight is ``frozen + scale * B @ A``.

    Args:
        name: Of the layer, inside the model.
        frozen: ``[out, in]`` weight under the adapter.
        scale: Of the adapter.
        a: Name of the parameter ``[rank, in]``.
        b: Name of the parameter ``[out, rank]``.
    """

    name: str
    frozen: Tensor
    scale: float
    a: str
    b: str


def low_rank_layers(model: QwenVL) -> Iterator[LowRankLayer]:
    """The layers that have an adapter.

    Raises:
        ValueError: A weight that is no such sum: of a layer that is not linear, with DoRA, or in four bits.
    """
    for name, layer in _adapted_layers(model).items():
        base, (adapter,) = layer.get_base_layer(), layer.active_adapters
        if not (isinstance(base, nn.Linear) and base.weight.is_floating_point()) or layer.use_dora[adapter]:
            raise ValueError(
                f"{name}: its weight is not the sum of a weight and a product of two matrices, as it is with lora on "
                "linear layers (and not with qlora or lora.use_dora)"
            )
        a, b = (f"{name}.lora_{factor}.{adapter}.weight" for factor in "AB")
        yield LowRankLayer(name, base.weight, layer.scaling[adapter], a, b)


def plain_weights(model: QwenVL, parts: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model without adapters that computes the same, one at a time; the model stays as it is.

    Four-bit weights are unpacked, and DoRA's rows have the lengths that it learned.

    Args:
        model: The backbone.
        parts: How the names begin of those that are wanted.

    Raises:
        ValueError: An adapter of a layer that is not linear.
    """
    from peft.utils.integrations import dequantize_module_weight

    adapted = {f"{name}.base_layer": layer for name, layer in _adapted_layers(model).items()}
    for name, weight in model.named_parameters():
        if "lora_" in name or not name.startswith(parts):
            continue
        owner = name.rpartition(".")[0]
        plain = weight if weight.is_floating_point() else dequantize_module_weight(model.get_submodule(owner))
        if owner in adapted and name.endswith(".weight"):
            plain = _with_adapter(name, adapted[owner], plain)
        yield name.replace(".base_layer.", "."), plain


def _with_adapter(name: str, layer: LoraLayer, weight: Tensor) -> Tensor:
    """``[out, in]`` what a layer multiplies by, its adapter included."""
    if not isinstance(layer.get_base_layer(), nn.Linear):
        raise ValueError(f"{name}: an adapter cannot be added to it, for its layer is not linear")
    (adapter,) = layer.active_adapters
    a, b = (factors[adapter].weight for factors in (layer.lora_A, layer.lora_B))
    merged = weight + layer.scaling[adapter] * (b @ a)
    if not layer.use_dora[adapter]:
        return merged
    lengths = layer.lora_magnitude_vector[adapter].weight
    return merged * (lengths / merged.norm(dim=1))[:, None]


def merge_into_base(model: QwenVL) -> None:
    """Adds what the adapters do to the weights under them, in place; the adapters stay as they are.

    Raises:
        ValueError: A sum is not finite.
    """
    for layer in _adapted_layers(model).values():
        layer.merge(safe_merge=True)
        layer.merged_adapters.clear()  # PEFT would go on without the adapter


def merge_earlier(model: QwenVL, state: Mapping[str, Tensor]) -> None:
    """Merges what a module's state dict keeps as ``earlier.<stage>.<number>``: adapters of earlier stages, in order.

    Args:
        model: The backbone as loaded, with adapters; these stay as they are.
        state: The module's; numbers are places in :func:`adapter_weights`.
    """
    own = adapter_weights(model)
    stages = {name.split(".")[1] for name in state if name.startswith("earlier.")}
    for stage in range(len(stages)):
        weights = [state[f"earlier.{stage}.{number}"].to(weight.device) for number, weight in enumerate(own)]
        with adapters_replaced(model, weights):
            merge_into_base(model)


def begin_adapters_anew(model: QwenVL, seed: int) -> None:
    """Gives the adapters fresh weights, in place, that have no effect yet.

    DoRA's magnitudes stay: after a merge they are the lengths of the rows of the weights.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for layer in _adapted_layers(model).values():
            for name in layer.active_adapters:
                layer.reset_lora_parameters(name, init_lora_weights=True)


def _adapted_layers(model: QwenVL) -> dict[str, LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
