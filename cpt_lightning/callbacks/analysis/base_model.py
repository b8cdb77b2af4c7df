"""The base: the backbone as it was before training, beside the one that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from lightning import LightningModule, Trainer

from cpt_lightning.models.adapters import adapters_off, has_adapters
from cpt_lightning.models.sharding import gather, release
from cpt_lightning.rollouts.sampling import sampling_mode
from cpt_lightning.strategy import FSDP2

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL


class BaseModel:
    """The model with its adapters switched off, or a frozen copy where weights under them change too.

    It stands outside of the module, and so in no checkpoint: a resumed run loads it again.

    Args:
        trainer: Lays a copy out as the model that is trained.
        module: Its owner.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trained: QwenVL = module.model
        self.copy: QwenVL | None = None
        if not has_adapters(self.trained) or module.along_stream == "renewed":
            self.copy = _load(trainer, module)

    @contextmanager
    def model(self) -> Iterator[QwenVL]:
        """The base, in eval mode and without gradients."""
        model = self.trained if self.copy is None else self.copy
        with sampling_mode(model), adapters_off(model) if has_adapters(model) else nullcontext():
            yield model

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Both models whole where they are in shards; every rank must ask."""
        models = [self.trained] if self.copy is None else [self.trained, self.copy]
        for model in models:
            gather(model)
        yield
        for model in models:
            release(model)


def _load(trainer: Trainer, module: LightningModule) -> QwenVL:
    with torch.random.fork_rng(devices=[]):  # fresh adapters draw their weights
        base = module.load_model().requires_grad_(False)
    trainer.precision_plugin.convert_module(base)
    if isinstance(trainer.strategy, FSDP2):
        trainer.strategy.spread(base)
        return base
    return base.to(module.device)
