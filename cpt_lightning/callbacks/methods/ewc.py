"""Elastic weight consolidation: weights that earlier tasks depend on are held where those tasks left them."""

from __future__ import annotations

from typing import Literal

import torch
from lightning import LightningModule, Trainer

from cpt_lightning.callbacks.methods.fisher import diagonal_fisher, own_answers
from cpt_lightning.callbacks.methods.kept_weights import refuse_other_adapters
from cpt_lightning.callbacks.methods.penalties import QuadraticPenalty
from cpt_lightning.models.weights import Weights, copy_of
from cpt_lightning.rollouts import Sampling
from cpt_lightning.tasks.checks import check_known
from cpt_lightning.types import Batch

Answered = Literal["samples", "targets"]
Anchors = Literal["latest", "every_task"]


class EWC(QuadraticPenalty):
    """Adds ``strength / 2 * sum(F * (weights - anchor)^2)`` to the loss (Kirkpatrick et al. 2017, arXiv 1612.00796).

    F is the diagonal of the Fisher information of the tasks learned so far: after each task the mean over ``num_rows``
    of its rows of the squared gradient of the log-probability of a whole completion. All ranks look at the same rows,
    so that F does not depend on their number. Before a second task begins there is no penalty. Works with every
    objective, with LoRA and full tuning; logged as ``train/ewc``. See :class:`QuadraticPenalty` about clipping.

    Args:
        strength: Weight of the penalty (lambda); 0 switches it off. F is small where completions are sure, so that
            values in the thousands are common.
        completions: Whose log-probability: ``samples`` of the policy itself, which gives the Fisher information, or the
            rows' ``targets``, which gives the empirical one that is often taken instead.
        num_rows: Rows of a task that F is estimated from.
        max_new_tokens: Longest sample.
        decay: What is left of the F of earlier tasks after each further one (gamma of online EWC, Schwarz et al. 2018,
            arXiv 1805.06370).
        anchors: ``latest`` holds weights where the last task left them (online EWC; Huszár 2018, arXiv 1712.03847);
            ``every_task`` adds up one penalty per task, each with the weights after that task as its anchor.

    Raises:
        ValueError: A count below 1, or a decay outside [0, 1]; adapters that are not shared by all tasks.
    """

    def __init__(
        self,
        strength: float = 1000.0,
        completions: Answered = "samples",
        num_rows: int = 64,
        max_new_tokens: int = 64,
        decay: float = 1.0,
        anchors: Anchors = "latest",
    ) -> None:
        super().__init__(strength, shown_as="train/ewc")
        check_known("EWC: ", completions=(completions, Answered), anchors=(anchors, Anchors))
        if num_rows < 1:
            raise ValueError(f"EWC: num_rows={num_rows} must be at least 1")
        if not 0 <= decay <= 1:
            raise ValueError(f"EWC: decay={decay} must lie in [0, 1]; 1 forgets nothing")
        self.sampling = Sampling(max_new_tokens) if completions == "samples" else None
        self.num_rows = num_rows
        self.decay = decay
        self.anchors = anchors

    @property
    def sets(self) -> list[torch.dtype | None]:
        """The anchor, and F."""
        return [None, torch.float32]

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses weights that no penalty can hold."""
        refuse_other_adapters(self, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task is learned: remembers its weights, and how much each matters; before the checkpoint is saved."""
        # After the last one too: the stream may be extended.
        stage = trainer.current_epoch
        batch = trainer.strategy.batch_to_device(trainer.datamodule.rows_of_stage(stage, self.num_rows))
        with trainer.precision_plugin.forward_context():
            self.remember(self.fisher(pl_module, batch, stage), copy_of(pl_module))

    def fisher(self, module: LightningModule, batch: Batch, stage: int) -> Weights:
        """The diagonal Fisher information of the rows of a stage, or the empirical one."""
        return diagonal_fisher(
            module, batch if self.sampling is None else own_answers(module, batch, self.sampling, stage)
        )

    def remember(self, fisher: Weights, weights: Weights) -> None:
        """Adds the Fisher information of a task, found at these weights."""
        if "precision" not in self.kept:
            self.kept = {"precision": fisher, "anchor": weights}
            return
        for name, precision in self.kept["precision"].items():
            total = self.decay * precision + fisher[name]
            if self.anchors == "every_task":
                # A sum of parabolas is one, around the mean of their anchors; where both are flat the anchor is moot.
                share = fisher[name] / total.clamp_min(torch.finfo(total.dtype).tiny)
                anchor = self.kept["anchor"][name]
                weights[name] = anchor + (share * (weights[name] - anchor)).to(anchor.dtype)
            self.kept["precision"][name] = total
        self.kept["anchor"] = weights
