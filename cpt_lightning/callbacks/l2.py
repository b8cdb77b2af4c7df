"""L2 to the start: weights are pulled back to where a task, or the stream, began."""

from __future__ import annotations

from typing import Literal

from lightning import LightningModule, Trainer

from cpt_lightning.callbacks.penalties import QuadraticPenalty
from cpt_lightning.models.weights import copy_of


class L2(QuadraticPenalty):
    """Adds ``strength / 2 * ||weights - anchor||^2`` to the loss (L2-SP, Li et al. 2018, arXiv 1802.01483, eq. 3).

    Logged as ``train/l2``. Works with every objective, with LoRA and full tuning. See :class:`QuadraticPenalty` for
    what it does to clipping. With an adaptive optimizer the pull is scaled like any other gradient.

    Args:
        strength: Weight of the penalty; 0 switches it off.
        anchor: ``task_start`` pulls to the weights with which the task began, ``base`` to those of the untrained base.
    """

    def __init__(self, strength: float = 0.01, anchor: Literal["task_start", "base"] = "task_start") -> None:
        super().__init__(strength, shown_as="train/l2")
        self.anchor = anchor

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task begins; one that is resumed half-way does not come here."""
        if self.anchor == "task_start" or "anchor" not in self.kept:
            self.kept["anchor"] = copy_of(pl_module)
