"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from cpt_lightning.functional import Reduction, forward_kl, token_weights, weighted_sum
from cpt_lightning.modules.reference import HeldToReference
from cpt_lightning.tasks.checks import check_known
from cpt_lightning.types import Batch


class SFT(HeldToReference):
    """Supervised fine-tuning: raises the probability of the reference completions.

    With a ``kl_coef`` the loss has a second term, Learning without Forgetting (arXiv 1606.09282): KL(reference ||
    policy) over the whole vocabulary at the targets' tokens, averaged over them as the loss is, logged as
    ``train/forward_kl``.

    Args:
        reduction: How the loss averages over tokens: ``sequence_mean`` gives every row the same weight, ``token_mean``
            every token (what transformers does; under gradient accumulation the mean is taken per micro-batch).
        **kwargs: Options of :class:`HeldToReference` and :class:`PostTraining`.
    """

    def __init__(self, reduction: Reduction = "sequence_mean", **kwargs):
        check_known(reduction=(reduction, Reduction))
        if reduction == "constant":
            raise ValueError("reduction='constant' belongs to RFT; SFT has 'sequence_mean' and 'token_mean'")
        super().__init__(**kwargs)
        if self.reference_kind == "synchronised":
            raise ValueError("reference=synchronised belongs to RFT; SFT has task_start and base")
        self.reduction: Reduction = reduction

    @property
    def learns_by_logprobs(self) -> bool:
        """Not where it is held to a reference over the whole vocabulary."""
        return not self.kl_coef

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The negative log-likelihood of the targets, in nats, and the divergence from the reference."""
        targets = batch.required_targets()
        self.account.add_tokens(batch.prompts, targets)
        num_sequences, num_tokens = self.mean_counts(len(targets), targets.mask.sum())
        weights = token_weights(  # [B, T]
            targets.mask, self.reduction, num_sequences=num_sequences, num_tokens=num_tokens
        )
        if self.kl_coef:
            logps, divergence = self.logps_and_divergence(batch.prompts, targets, forward_kl)
            kl = weighted_sum(divergence, weights, targets.mask)
            loss = self.kl_coef * kl - weighted_sum(logps, weights, targets.mask)
            self.log("train/forward_kl", kl.detach(), batch_size=len(batch), sync_dist=True)
        else:
            loss = -weighted_sum(self.logprobs(batch.prompts, targets), weights, targets.mask)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)
        self.log_means({"train/completion_length": targets.lengths.float().mean()}, count=len(batch))
        return self.anchored(loss)
