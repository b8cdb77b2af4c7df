"""What of the backbone is trained: all of it, some of its parts, or low-rank adapters inside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from cpt_lightning.tasks.checks import check_known, check_known_lists

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

Part = Literal["vision_tower", "projector", "language_model"]
AlongStream = Literal["shared", "renewed", "per_task"]

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
        use_rslora: Scale by ``alpha / sqrt(rank)`` instead (rsLoRA, arXiv 2312.03732), so that high ranks still learn.
        use_dora: Learn magnitude and direction of the weights apart (DoRA, arXiv 2402.09353).
        along_stream: ``shared``: one adapter learns all tasks. ``renewed``: when the next task begins, the adapter is
            merged into the weights and begun anew. ``per_task``: every task gets a new adapter over the base; a task
            that was learned is evaluated with its own (so which task a row is of is known), all else with the newest.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    parts: list[Part] = field(default_factory=lambda: ["language_model"])
    targets: str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    along_stream: AlongStream = "shared"

    def __post_init__(self) -> None:
        check_known("lora.", along_stream=(self.along_stream, AlongStream))
        check_known_lists("lora.", parts=(self.parts, Part))
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout={self.dropout} must lie in [0, 1)")
        if not self.parts and self.targets is None:
            raise ValueError("lora.parts=[] gives no part an adapter; name one, or set lora.targets")

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
        ValueError: No module of the model, or of one of the parts, has a name that matches the targets.
    """
    from peft import LoraConfig

    names = [name for name, _ in model.named_modules()]
    patterns = [lora.targets] if lora.targets is not None else [LINEAR_LAYERS[part] for part in lora.parts]
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"lora: no module of the backbone matches {pattern!r}")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_pattern,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
    )
    model.add_adapter(config)


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


def adapter_weights(model: QwenVL) -> list[nn.Parameter]:
    """All weights of the adapters inside the model, always in the same order."""
    return [weight for name, weight in model.named_parameters() if "lora_" in name]


@contextmanager
def adapters_replaced(model: QwenVL, weights: Iterable[Tensor]) -> Iterator[None]:
    """The model with other weights in its adapters, for as long as it lasts; its own come back untouched.

    Args:
        model: The backbone, with adapters.
        weights: Ordered as :func:`adapter_weights`.
    """
    adapters = adapter_weights(model)
    own = [weight.data for weight in adapters]
    for weight, other in zip(adapters, weights, strict=True):
        weight.data = other.data  # not a copy: that would touch what a rollout's graph still needs
    try:
        yield
    finally:
        for weight, data in zip(adapters, own, strict=True):
            weight.data = data
