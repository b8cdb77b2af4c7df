"""What ranks tell each other in a step, so that several learn and log what one process would."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import lightning as L
import torch
from torch import Tensor, distributed

from cpt_lightning.models.qwen_vl import QwenVL
from cpt_lightning.models.sharding import is_sharded, unsteady


class AcrossRanks(L.LightningModule):
    """A module that adds up, compares and logs over all ranks."""

    model: QwenVL

    def anchored(self, loss: Tensor) -> Tensor:
        """The same loss, with every trainable parameter in its graph where there are several ranks.

        These wait for a gradient of each, and a batch without an image gives the vision tower none. Shards of decoder
        layers have theirs anyway.
        """
        if self.trainer.world_size == 1:
            return loss
        mine = unsteady(self.model) if is_sharded(self.model) else [p for p in self.parameters() if p.requires_grad]
        return loss + sum(parameter.sum() for parameter in mine) * 0

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks; every rank must call it."""
        return self.trainer.strategy.reduce(value.detach().clone(), reduce_op="sum")

    def mean_counts(self, *counts: int | Tensor) -> list[float]:
        """Each count's mean over all ranks, which losses divide by: gradients are averaged. Every rank must call it."""
        mine = torch.stack([torch.as_tensor(count, device=self.device).double() for count in counts])
        return (self.sum_over_ranks(mine) / self.trainer.world_size).tolist()

    def max_over_ranks(self, count: int) -> int:
        """The largest count of any rank; every rank must call it."""
        if self.trainer.world_size == 1:
            return count
        return int(self.trainer.strategy.reduce(torch.tensor(count, device=self.device), reduce_op="max"))

    def log_means(self, means: Mapping[str, Tensor], count: int | Tensor, prog_bar: Collection[str] = ()) -> None:
        """Logs means over the rows, or tokens, of all ranks; every rank must have the same ones.

        Args:
            means: Finite scalars, each over this rank's rows or tokens.
            count: How many those are; a rank may have none.
            prog_bar: Which of them the progress bar shows.
        """
        mine = torch.stack([*means.values(), torch.ones((), device=self.device)]).double() * count
        *sums, total = self.sum_over_ranks(mine).float().unbind()
        for name, value in zip(means, sums, strict=True):
            self.log(name, value / total.clamp(min=1), prog_bar=name in prog_bar, batch_size=1)

    def log_means_of_some(self, values: Mapping[str, Tensor]) -> None:
        """Logs means over all ranks of what a rank, or a row, need not have: tasks differ. Every rank must call it.

        Args:
            values: By name, ``nan`` where a row has none.
        """
        sums = {name: torch.stack([each.nansum(), (~each.isnan()).sum()]) for name, each in values.items()}
        if self.trainer.world_size > 1:
            sums = self._added_by_name(sums)
        for name, (total, count) in sums.items():
            self.log(name, total / count.clamp(min=1), batch_size=1)

    def _added_by_name(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ranks: list[dict[str, list[float]]] = [{}] * self.trainer.world_size
        values = torch.stack([*mine.values(), torch.zeros(2, device=self.device)]).tolist()  # one wait; maybe no names
        distributed.all_gather_object(ranks, dict(zip(mine, values, strict=False)))
        names = sorted({name for rank in ranks for name in rank})
        added = torch.tensor([[rank.get(name, [0.0, 0.0]) for name in names] for rank in ranks]).sum(dim=0)
        return dict(zip(names, added.to(self.device), strict=True))
