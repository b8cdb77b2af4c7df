"""What of the backbone is trained: all of it, some of its parts, or low-rank adapters inside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

Part = Literal["vision_tower", "projector", "language_model"]

LINEAR_LAYERS = {
    "language_model": r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    "vision_tower": r"model\.visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)",
    "projector": r"model\.visual\.merger\.mlp\.(0|2)",
}
"""The linear layers of each part, as a regular expression over module names."""


@dataclass
class Lora:
    """Low-rank adapters (Hu et al. 2021) on the linear layers of the chosen parts, through PEFT.

    Args:
        rank: Rank of the update.
        alpha: The update is scaled by ``alpha / rank``.
        dropout: Dropout before the adapter.
        parts: Parts of the backbone that get adapters.
        targets: Regular expression over module names, in place of ``parts``.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    parts: list[Part] = field(default_factory=lambda: ["language_model"])
    targets: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout={self.dropout} must lie in [0, 1)")

    @property
    def target_pattern(self) -> str:
        """Regular expression of the module names that get an adapter."""
        return self.targets or "|".join(f"({LINEAR_LAYERS[part]})" for part in self.parts)


def parts_of(model: QwenVL) -> dict[str, list[nn.Module]]:
    """The modules that make up each part of the backbone."""
    visual = model.model.visual
    return {
        "vision_tower": [visual.patch_embed, visual.blocks],
        "projector": [visual.merger],
        "language_model": [model.model.language_model, model.lm_head],
    }


def freeze(model: QwenVL, parts: list[Part]) -> None:
    """Takes the parts out of training; their weights stay bit for bit what they are."""
    for part in parts:
        for module in parts_of(model)[part]:
            module.requires_grad_(False)


def add_lora(model: QwenVL, lora: Lora) -> None:
    """Puts adapters into the model, in place, and freezes everything else.

    Adapters go inside the transformers model (its own PEFT integration) instead of a wrapper around it, so that every
    other part of the code, sharding included, sees the same model whatever the tuning.

    Raises:
        ValueError: No module of the model has a name that matches the targets.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_pattern, bias="none"
    )
    try:
        model.add_adapter(config)
    except ValueError as error:
        raise ValueError(f"lora: no module of the backbone matches {lora.target_pattern!r}: {error}") from error


def has_adapters(model: QwenVL) -> bool:
    """Whether the model has adapters inside it."""
    return bool(model._hf_peft_config_loaded)


@contextmanager
def adapters_off(model: QwenVL) -> Iterator[None]:
    """The base model, for as long as it lasts."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
