"""All tasks at once, each by the objective that suits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import lightning as L
import torch
from torch import Tensor

from cpt_lightning.functional import Reduction, token_weights, weighted_sum
from cpt_lightning.modules.rft import RFT, Prepared
from cpt_lightning.modules.updates import Loss, UpdateStats
from cpt_lightning.tasks.checks import check_known
from cpt_lightning.types import Batch, Prompts, Rollout

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
        check_known(objective=(objective, Objective), sft_reduction=(sft_reduction, Reduction))
        check_known("objectives.", **{name: (value, Objective) for name, value in (objectives or {}).items()})
        if sft_reduction == "constant":
            raise ValueError("sft_reduction='constant' belongs to RFT; SFT has 'sequence_mean' and 'token_mean'")
        self.objective: Objective = objective
        self.objectives = dict(objectives or {})
        self.weights = dict(weights or {})
        self.sft_reduction: Reduction = sft_reduction

    def check_fit(self, trainer: L.Trainer) -> None:
        """Refuses objectives and weights of tasks that the stream does not have.

        Raises:
            ValueError: Names the option and the tasks.
        """
        super().check_fit(trainer)
        if trainer.datamodule is None:
            return
        known = set(trainer.datamodule.task_names)
        for option, names in (("objectives", self.objectives), ("weights", self.weights)):
            if unknown := sorted(set(names) - known):
                raise ValueError(f"{option} names {unknown}, but the stream has the tasks {sorted(known)}")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Samples groups of the reinforced rows, then updates on them and on the supervised rows together."""
        self.start_step(batch, batch_idx)
        tasks = [example.task for example in batch.prompts.examples]
        weights = self._weights_of(batch.prompts)
        supervised = [row for row, task in enumerate(tasks) if self.objectives.get(task, self.objective) == "sft"]
        reinforced = sorted(set(range(len(batch))) - set(supervised))
        rollout = self._collect_of(reinforced, batch.prompts, batch_idx)
        stats: list[UpdateStats] = []
        with self.timed("update"):
            prepared = None if rollout is None else self.prepare(rollout)
            num_sampled = 0 if rollout is None else len(rollout.prompts)
            parts = zip(self.update_rows(supervised), self.update_rows(range(num_sampled)), strict=True)
            for sft_rows, rft_rows in parts:
                num_sft, num_rft = self.mean_counts(len(sft_rows), len(rft_rows) * bool(reinforced))
                num_rows = num_sft + num_rft or 1
                losses = self.sft_losses(batch, weights, sft_rows, share=num_sft / num_rows)
                if rollout is not None and prepared is not None:
                    policy_losses = self.losses(rollout, prepared, rft_rows)
                    losses += [_scaled(loss, num_rft / num_rows) for loss in policy_losses]
                stats += self.update(losses, batch.prompts)
        if rollout is not None and prepared is not None:
            self.log_rollout(rollout, zero_signal_groups=prepared.zero_signal_groups)
        return self.log_updates(stats, self.updates_per_step)

    def _collect_of(self, rows: list[int], prompts: Prompts, batch_idx: int) -> Rollout | None:
        """Groups of the rows that are reinforced; ``None`` where no rank has any."""
        if not self.max_over_ranks(len(rows)):
            return None
        # A rank without a reinforced row samples for one anyway, to take part in what ranks exchange.
        return replace(self.collect(prompts.select(rows or [0]), batch_idx), counts=bool(rows))

    def prepare(self, rollout: Rollout) -> Prepared:
        """As in RFT; each prompt weighs what its task does."""
        return replace(super().prepare(rollout), row_weights=self._weights_of(rollout.prompts))

    def _weights_of(self, prompts: Prompts) -> Tensor:
        """``[B]`` weight of each prompt's task."""
        weights = [self.weights.get(example.task, 1.0) for example in prompts.examples]
        return torch.tensor(weights, dtype=torch.float32, device=self.device)

    def sft_losses(self, batch: Batch, weights: Tensor, rows: Sequence[int], share: float) -> list[Loss]:
        """The supervised loss of one update on ``rows``, in micro-batches that add up to it; every rank must ask."""
        own_tokens = batch.required_targets().mask[list(rows)].sum() if rows else 0
        num_sequences, num_tokens = self.mean_counts(len(rows), own_tokens)
        weigh = partial(token_weights, reduction=self.sft_reduction, num_sequences=num_sequences, num_tokens=num_tokens)
        size = self.micro_batch_prompts or max(1, len(rows))
        micro_batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [partial(self.sft_loss, batch, weights, micro, weigh, share) for micro in micro_batches]

    def sft_loss(
        self, batch: Batch, weights: Tensor, rows: Sequence[int], weigh, share: float
    ) -> tuple[Tensor, UpdateStats]:
        """A micro-batch's share of the supervised loss."""
        targets = batch.required_targets().select(rows)
        prompts = batch.prompts.select(rows)
        logps = self.logprobs(prompts, targets)
        self.account.add_tokens(prompts, targets)
        loss = -share * weighted_sum(logps, weigh(targets.mask) * weights[list(rows), None], targets.mask)
        return loss, UpdateStats(loss.detach())


def _scaled(compute: Loss, share: float) -> Loss:
    def scaled() -> tuple[Tensor, UpdateStats]:
        loss, stats = compute()
        return loss * share, replace(stats, loss=stats.loss * share)

    return scaled
