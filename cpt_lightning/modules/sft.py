"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from cpt_lightning.functional import Reduction, token_weights, weighted_sum
from cpt_lightning.modules.base import PostTraining, targets_of
from cpt_lightning.types import Batch


class SFT(PostTraining):
    """Supervised fine-tuning: raises the probability of the reference completions.

    Args:
        reduction: How the loss averages over tokens: ``sequence_mean`` gives every row the same weight, ``token_mean``
            every token (what transformers does; under gradient accumulation the mean is taken per micro-batch).
        **kwargs: Options of :class:`PostTraining`.
    """

    def __init__(self, reduction: Reduction = "sequence_mean", **kwargs):
        if reduction == "constant":
            raise ValueError("reduction='constant' belongs to RFT; SFT has 'sequence_mean' and 'token_mean'")
        super().__init__(**kwargs)
        self.reduction: Reduction = reduction

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The negative log-likelihood of the targets, in nats."""
        targets = targets_of(batch)
        logps = self.logprobs(batch.prompts, targets)  # [B, T]
        self.account.add_tokens(batch.prompts, targets)
        num_tokens = self.mean_over_ranks(targets.mask.sum()).item()
        loss = -weighted_sum(logps, token_weights(targets.mask, self.reduction, num_tokens=num_tokens), targets.mask)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/completion_length", targets.lengths.float().mean(), batch_size=len(batch))
        return self.anchored(loss)
