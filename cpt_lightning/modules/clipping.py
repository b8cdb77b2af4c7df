"""Gradients before the optimizer's step: clipped by norm, dropped if they are not finite."""

from __future__ import annotations

import torch
from lightning import Trainer
from torch import Tensor, nn

from cpt_lightning.models.sharding import own_part, whole
from cpt_lightning.modules.ranks import AcrossRanks

NONFINITE_STEPS_ALLOWED = 5
"""After so many steps in a row without a finite gradient the run stops: it will not recover."""


class ClippedGradients(AcrossRanks):
    """A module that looks at its whole gradient before each optimizer step."""

    max_grad_norm: float | None

    def __init__(self) -> None:
        super().__init__()
        self._nonfinite_in_a_row = 0

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clips by norm, and logs the gradient's norm and the learning rate of the coming step."""
        # Not in on_before_optimizer_step: once another hook logs, Lightning (2.6) drops what training_step had logged
        # before its optimizer step in the first batch of an epoch.
        self.log_clipping(self.clip_gradients_by_norm(optimizer))

    def log_clipping(self, shown: dict[str, Tensor | float]) -> None:
        """Logs what :meth:`clip_gradients_by_norm` tells."""
        for name, value in shown.items():
            self.log(name, value, prog_bar=name == "train/nonfinite_steps")

    def clip_gradients_by_norm(self, optimizer) -> dict[str, Tensor | float]:
        """Scales a large gradient down; drops one that is not finite, so that the step changes nothing.

        Returns:
            What to log: ``train/grad_norm``, ``train/lr``, and where a gradient was dropped ``train/nonfinite_steps``.

        Raises:
            FloatingPointError: Gradients were not finite several times in a row.
        """
        self._forget_untouched_vision()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        limit = torch.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = whole(nn.utils.clip_grad_norm_(parameters, limit))
        shown: dict[str, Tensor | float] = {"train/grad_norm": norm, "train/lr": float(optimizer.param_groups[0]["lr"])}
        if torch.isfinite(norm):
            self._nonfinite_in_a_row = 0
            return shown
        optimizer.zero_grad(set_to_none=True)
        self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row >= NONFINITE_STEPS_ALLOWED:
            raise FloatingPointError(
                f"{self._nonfinite_in_a_row} steps in a row had a gradient that is not finite "
                f"(step {self.global_step}); "
                "lower the learning rate, or use bf16-mixed or 32-true precision"
            )
        return {**shown, "train/nonfinite_steps": float(self._nonfinite_in_a_row)}

    def _forget_untouched_vision(self) -> None:
        """Where no image and no penalty gave the vision tower a gradient, on any rank, lets the optimizer pass it by.

        A zero, as :meth:`anchored` leaves, would have weight decay and moments move it; one process has none at all.
        """
        reached = [weight for weight in self.model.model.visual.parameters() if weight.grad is not None]
        if not reached:  # on all ranks alike: the tower is frozen, or nothing is learned
            return
        is_touched = torch.stack([own_part(weight.grad).any() for weight in reached]).any()
        if not self.max_over_ranks(int(is_touched)):
            for weight in reached:
                weight.grad = None


def check_clipping(trainer: Trainer) -> None:
    """Refuses a Trainer that would clip as well.

    Raises:
        ValueError: Says what to set instead.
    """
    for option in ("gradient_clip_val", "gradient_clip_algorithm"):
        if getattr(trainer, option) is not None:
            raise ValueError(f"trainer.{option}: set model.init_args.max_grad_norm instead, for every objective")
