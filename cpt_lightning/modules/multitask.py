"""All tasks at once, each by the objective that suits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cpt_lightning.functional import Reduction, token_weights, weighted_sum
from cpt_lightning.modules.base import targets_of
from cpt_lightning.modules.rft import RFT
from cpt_lightning.modules.updates import Loss, UpdateStats
from cpt_lightning.types import Batch, Prompts

Objective = Literal["sft", "rft"]


class MultiTask(RFT):
    """Joint training of all tasks in a mixed stage: the upper bound that both papers compare sequential training with.

    Every row is learned by the objective of its task; supervised and reinforced rows of a batch share one optimizer
    step, each weighing what its share of the batch is times its task's weight. How often a task is drawn is the
    stream's ``mixing``.

    What ``sampling.prefix`` has completions begin with is none of the supervised rows' business: their targets are
    learned as they are.

    Args:
        objective: Objective of the tasks that ``objectives`` does not name.
        objectives: Objective by task name: ``sft`` or ``rft``.
        weights: Weight of a task's rows in the loss, by task name; 1 by default.
        sft_reduction: How the supervised loss averages over tokens.
        **kwargs: Options of :class:`RFT`.
    """

    def __init__(
        self,
        objective: Objective = "sft",
        objectives: Mapping[str, Objective] | None = None,
        weights: Mapping[str, float] | None = None,
        sft_reduction: Reduction = "sequence_mean",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if any(weight < 0 for weight in (weights or {}).values()):
            raise ValueError(f"weights={dict(weights or {})} must not be negative")
        if sft_reduction == "constant":
            raise ValueError("sft_reduction='constant' belongs to RFT; SFT has 'sequence_mean' and 'token_mean'")
        self.objective: Objective = objective
        self.objectives = dict(objectives or {})
        self.weights = dict(weights or {})
        self.sft_reduction: Reduction = sft_reduction

    def on_fit_start(self) -> None:
        """Refuses objectives and weights of tasks that the stream does not have."""
        super().on_fit_start()
        if self.trainer.datamodule is None:
            return
        known = set(self.trainer.datamodule.task_names)
        for option, names in (("objectives", self.objectives), ("weights", self.weights)):
            if unknown := sorted(set(names) - known):
                raise ValueError(f"{option} names {unknown}, but the stream has the tasks {sorted(known)}")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Samples groups of the reinforced rows, then updates on them and on the supervised rows together."""
        self.start_step(batch, batch_idx)
        tasks = [example.task for example in batch.prompts.examples]
        weights = self._weights_of(batch.prompts)
        supervised = [row for row, task in enumerate(tasks) if self.objectives.get(task, self.objective) == "sft"]
        reinforced = sorted(set(range(len(batch))) - set(supervised))
        num_sampled, policy_losses = 0, _no_losses
        if self._max_over_ranks(len(reinforced)):
            # A rank without a reinforced row samples for one anyway, at weight 0, to take part in what ranks exchange.
            rollout = self.collect(batch.prompts.select(reinforced or [0]), batch_idx)
            policy = self.prepare(rollout)
            policy.row_weights = self._weights_of(rollout.prompts) * bool(reinforced)
            num_sampled = len(rollout.prompts)
            policy_losses = partial(self.losses, rollout, policy)
            self.log_rollout(rollout)
        stats: list[UpdateStats] = []
        with self.timed("update"):
            parts = zip(self.update_rows(supervised), self.update_rows(range(num_sampled)), strict=True)
            for sft_rows, rft_rows in parts:
                num_rows = max(1, len(sft_rows) + (len(rft_rows) if reinforced else 0))
                losses = self.sft_losses(batch, weights, sft_rows, share=len(sft_rows) / num_rows)
                losses += [_scaled(loss, len(rft_rows) / num_rows) for loss in policy_losses(rft_rows)]
                stats += self.update(losses, batch.prompts)
        self.log_updates(stats, self.updates_per_step)

    def _weights_of(self, prompts: Prompts) -> Tensor:
        """``[B]`` weight of each prompt's task."""
        weights = [self.weights.get(example.task, 1.0) for example in prompts.examples]
        return torch.tensor(weights, device=self.device)

    def sft_losses(self, batch: Batch, weights: Tensor, rows: Sequence[int], share: float) -> list[Loss]:
        """The supervised loss of one update on ``rows``, in micro-batches that add up to it."""
        if not rows:
            return []
        mask = targets_of(batch).mask[list(rows)]
        weigh = partial(
            token_weights, reduction=self.sft_reduction, num_sequences=len(rows), num_tokens=mask.sum().item()
        )
        size = self.micro_batch_prompts or len(rows)
        micro_batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [partial(self.sft_loss, batch, weights, micro, weigh, share) for micro in micro_batches]

    def sft_loss(
        self, batch: Batch, weights: Tensor, rows: Sequence[int], weigh, share: float
    ) -> tuple[Tensor, UpdateStats]:
        """A micro-batch's share of the supervised loss."""
        targets = targets_of(batch).select(rows)
        prompts = batch.prompts.select(rows)
        logps = self.logprobs(prompts, targets)
        self.account.add_tokens(prompts, targets)
        loss = -share * weighted_sum(logps, weigh(targets.mask) * weights[list(rows), None], targets.mask)
        return loss, UpdateStats(loss.detach())


def _no_losses(rows: list[int]) -> list[Loss]:
    return []


def _scaled(compute: Loss, share: float) -> Loss:
    def scaled() -> tuple[Tensor, UpdateStats]:
        loss, stats = compute()
        return loss * share, UpdateStats(stats.loss * share, stats.policy, stats.kl)

    return scaled
