"""L2 to the start: weights are pulled back to where a task, or the stream, began."""

from __future__ import annotations

from typing import Literal

from lightning import LightningModule, Trainer

from cpt_lightning.callbacks.methods.kept_weights import refuse_other_adapters
from cpt_lightning.callbacks.methods.penalties import QuadraticPenalty
from cpt_lightning.models.weights import copy_of
from cpt_lightning.tasks.checks import check_known

Anchor = Literal["task_start", "base"]


class L2(QuadraticPenalty):
    """Adds ``strength / 2 * ||weights - anchor||^2`` to the loss (L2-SP, Li et al. 2018, arXiv 1802.01483, eq. 3).

    Logged as ``train/l2``. Works with every objective, with LoRA and full tuning. See :class:`QuadraticPenalty` for
    what it does to clipping. With an adaptive optimizer the pull is scaled like any other gradient.

    Args:
        strength: Weight of the penalty; 0 switches it off.
        anchor: ``task_start`` pulls to the weights with which the task began, ``base`` to those of the untrained base.

    Raises:
        ValueError: A negative strength; the anchor ``base`` for adapters that are not shared by all tasks.
    """

    def __init__(self, strength: float = 0.01, anchor: Anchor = "task_start") -> None:
        check_known("L2: ", anchor=(anchor, Anchor))
        super().__init__(strength, shown_as="train/l2")
        self.anchor = anchor

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses an anchor that another adapter had."""
        if self.anchor == "base":
            refuse_other_adapters(self, pl_module, but=", or anchor to task_start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        """A task begins; one that is resumed half-way has its anchor in its checkpoint."""
        # Not in on_train_epoch_start: an adapter that is renewed comes after that of callbacks.
        if batch_idx == 0 and (self.anchor == "task_start" or "anchor" not in self.kept):
            self.kept = {}  # gives its memory back first
            self.kept["anchor"] = copy_of(pl_module)
