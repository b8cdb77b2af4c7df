"""Manual optimization: one optimizer step on losses that come in micro-batches, on one rank or many."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from cpt_lightning.functional import Mismatch, PolicyStats
from cpt_lightning.models.sharding import gather
from cpt_lightning.modules.base import PostTraining
from cpt_lightning.types import Completions, Prompts


@dataclass
class UpdateStats:
    """What one micro-batch showed.

    Args:
        loss: Its share of the loss of the update.
        policy: Ratios and clipping, if it had a policy loss.
        kl: Token mean of the divergence from the reference, if there is one.
        mismatch: How far the policy is from the engine that sampled, if that is another one than ours.
    """

    loss: Tensor
    policy: PolicyStats | None = None
    kl: Tensor | None = None
    mismatch: Mismatch | None = None


Loss = Callable[[], tuple[Tensor, UpdateStats]]
"""Computes a micro-batch's share of the loss of an update, when its turn comes."""


class ManualUpdates(PostTraining):
    """For objectives that take several optimizer steps, or micro-batches of several kinds, per training batch.

    Args:
        **kwargs: Options of :class:`PostTraining`.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self._clipped: dict[str, Tensor | float] = {}

    def check_fit(self, trainer: L.Trainer) -> None:
        """Refuses a precision whose loss scaling would reach the clipping of gradients, and accumulation over batches.

        Raises:
            ValueError: Names the option and the mend.
        """
        super().check_fit(trainer)
        if trainer.precision == "16-mixed":
            raise ValueError(
                "trainer.precision=16-mixed scales the loss, which manual updates do not undo; use bf16-mixed"
            )
        scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)
        if scheduled or (batches := trainer.accumulate_grad_batches) != 1:
            option = "GradientAccumulationScheduler" if scheduled else f"trainer.accumulate_grad_batches={batches}"
            raise ValueError(
                f"{option} is for SFT: an update of a rollout takes all of its "
                "prompts; micro_batch_prompts limits its memory, data.prompts_per_step makes it larger"
            )

    def update(self, losses: list[Loss], prompts: Prompts) -> list[UpdateStats]:
        """One optimizer step on the sum of the losses; gradients are exchanged between ranks once.

        Args:
            losses: Micro-batches; none if nothing is to be learned, which leaves all weights as they are.
            prompts: Any prompts, for a rank that has fewer micro-batches than another and must not lag behind.
        """
        gather(self.model)  # the update before left every rank its shards
        optimizer = self.optimizers()
        losses = losses + [partial(self._nothing, prompts)] * (self.max_over_ranks(len(losses)) - len(losses))
        stats = []
        for number, compute in enumerate(losses, start=1):
            is_last = number == len(losses)
            with self._gradient_exchange(now=is_last):
                loss, part = compute()
                self.manual_backward(self.anchored(loss) if is_last else loss)
            stats.append(part)
        optimizer.step()
        self.log_clipping(self._clipped)
        optimizer.zero_grad()
        if schedule := self.lr_schedulers():
            schedule.step()
        return stats

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips, as automatic optimization does, when callbacks have added to the gradient what they add."""
        # Logged by the step: see configure_gradient_clipping.
        self._clipped = self.clip_gradients_by_norm(optimizer)

    def _nothing(self, prompts: Prompts) -> tuple[Tensor, UpdateStats]:
        """A loss of 0 that has a graph: gradients of the other ranks have something to be added to."""
        ids = torch.full((1, 1), self.processor.eos_token_id, device=self.device)
        logps = self.logprobs(prompts.select([0]), Completions(ids, torch.ones_like(ids).bool()))
        return logps.sum() * 0, UpdateStats(torch.zeros((), device=self.device))

    def _gradient_exchange(self, now: bool) -> AbstractContextManager:
        strategy = self.trainer.strategy
        return nullcontext() if now or not isinstance(strategy, ParallelStrategy) else strategy.block_backward_sync()

    # -- what is shown -------------------------------------------------------------------------------------------

    def log_updates(self, stats: list[UpdateStats], num_updates: int) -> Tensor:
        """Logs the mean over a step's updates of the loss, and what they showed of the tokens that they learned.

        Returns:
            That mean, on this rank: what callbacks get as a step's loss.
        """
        loss = sum((part.loss for part in stats), torch.zeros((), device=self.device)) / num_updates
        self.log("train/loss", loss, batch_size=1, sync_dist=True)
        learned = [part for part in stats if part.policy is not None]
        if self.max_over_ranks(len(learned)):  # a rank that had none tells so
            self.log_learned(learned or [self._of_no_tokens()])
        return loss

    def log_learned(self, parts: list[UpdateStats]) -> None:
        """Logs clipping and mismatch over the tokens of all ranks; every rank must call it.

        Args:
            parts: Micro-batches with a policy loss, at least one.
        """
        policy = PolicyStats.mean([part.policy for part in parts if part.policy is not None])
        means = {"train/clip_fraction": policy.clip_fraction, "train/ratio": policy.ratio_mean}
        if self.sampler is not None:
            mismatch = Mismatch.of_all([part.mismatch for part in parts if part.mismatch is not None])
            shown = {f"train/mismatch/{name}": value for name, value in mismatch.shown.items()}
            self.log("train/mismatch/max", shown.pop("train/mismatch/max"), sync_dist=True, reduce_fx="max")
            means |= shown
        self.log_means(means, count=policy.num_tokens)

    def _of_no_tokens(self) -> UpdateStats:
        zero = torch.zeros((), device=self.device)
        return UpdateStats(zero, PolicyStats.of_nothing(zero), kl=zero, mismatch=Mismatch.of_nothing(zero))
