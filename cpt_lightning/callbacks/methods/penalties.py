"""What holds weights back: quadratic penalties, whose gradient joins that of the loss."""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from cpt_lightning.callbacks.methods.kept_weights import KeptWeights
from cpt_lightning.models.sharding import whole
from cpt_lightning.models.weights import trained


class QuadraticPenalty(KeptWeights):
    """Adds ``strength / 2 * sum(precision * (weights - anchor)^2)`` to the loss, once per optimizer step.

    Its gradient is added when those of all micro-batches and ranks have come together, and before gradients are
    clipped, in automatic and manual optimization alike: the penalty is part of what ``train/grad_norm`` shows and
    ``max_grad_norm`` limits. It is added where the loss has no gradient, too. ``kept["anchor"]`` and, unless all
    weights count alike, ``kept["precision"]`` say where weights are pulled and how much each counts.

    Args:
        strength: Weight of the penalty; 0 switches it off.
        shown_as: The penalty is logged under this name.

    Raises:
        ValueError: A negative strength.
    """

    def __init__(self, strength: float, shown_as: str) -> None:
        super().__init__()
        if strength < 0:
            raise ValueError(f"{type(self).__name__}: strength={strength} must not be negative")
        self.strength = strength
        self.shown_as = shown_as
        self._penalty: Tensor | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds the gradient of the penalty."""
        if not self.strength or "anchor" not in self.kept:
            return
        parts = []
        for name, parameter in trained(pl_module).items():
            distance = parameter.detach() - self.kept["anchor"][name]
            pull = distance * self.kept["precision"][name] if "precision" in self.kept else distance
            gradient = (self.strength * pull).to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            parts.append(whole((pull * distance).float().sum()))
        self._penalty = self.strength / 2 * torch.stack(parts).sum()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        """Logs the penalty before the batch's last optimizer step."""
        # Not when it is computed: see PostTraining.configure_gradient_clipping.
        if self._penalty is not None:
            self.log(self.shown_as, self._penalty, batch_size=1)
            self._penalty = None
