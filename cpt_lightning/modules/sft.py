"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from cpt_lightning.functional import Reduction, token_weights, weighted_sum
from cpt_lightning.functional.distillation import forward_kl
from cpt_lightning.models.qwen_vl import output_weight
from cpt_lightning.modules.base import PostTraining, targets_of
from cpt_lightning.modules.reference import Reference, ReferenceKind
from cpt_lightning.rollouts.packing import completion_hidden, hidden_logprobs
from cpt_lightning.types import Batch, Completions, Prompts


class SFT(PostTraining):
    """Supervised fine-tuning: raises the probability of the reference completions.

    Args:
        reduction: How the loss averages over tokens: ``sequence_mean`` gives every row the same weight, ``token_mean``
            every token (what transformers does; under gradient accumulation the mean is taken per micro-batch).
        kl_coef: Weight of KL(reference || policy) over the whole vocabulary at the tokens of the targets, averaged over
            them as the loss is: Learning without Forgetting (arXiv 1606.09282). Logged as ``train/forward_kl``; 0 needs
            no reference.
        reference: ``task_start`` is the model as the previous task left it, ``base`` as it was loaded.
        **kwargs: Options of :class:`PostTraining`.
    """

    def __init__(
        self,
        reduction: Reduction = "sequence_mean",
        kl_coef: float = 0.0,
        reference: ReferenceKind = "task_start",
        **kwargs,
    ):
        if reduction == "constant":
            raise ValueError("reduction='constant' belongs to RFT; SFT has 'sequence_mean' and 'token_mean'")
        if kl_coef < 0:
            raise ValueError(f"kl_coef={kl_coef} must not be negative")
        super().__init__(**kwargs)
        self.reduction: Reduction = reduction
        self.kl_coef = kl_coef
        self.reference_kind: ReferenceKind = reference

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The negative log-likelihood of the targets, in nats, and the divergence from the reference."""
        targets = targets_of(batch)
        self.account.add_tokens(batch.prompts, targets)
        num_tokens = self.mean_over_ranks(targets.mask.sum()).item()
        weights = token_weights(targets.mask, self.reduction, num_tokens=num_tokens)  # [B, T]
        if self.kl_coef:
            logps, divergence = self.logprobs_and_divergence(batch.prompts, targets)
            kl = weighted_sum(divergence, weights, targets.mask)
            loss = self.kl_coef * kl - weighted_sum(logps, weights, targets.mask)
            self.log("train/forward_kl", kl.detach(), batch_size=len(batch))
        else:
            loss = -weighted_sum(self.logprobs(batch.prompts, targets), weights, targets.mask)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/completion_length", targets.lengths.float().mean(), batch_size=len(batch))
        return self.anchored(loss)

    # -- the reference -------------------------------------------------------------------------------------------

    def logprobs_and_divergence(self, prompts: Prompts, targets: Completions) -> tuple[Tensor, Tensor]:
        """``[B, T]`` log-probabilities by the policy, and KL(reference || policy); one pass of each model."""
        self.account.add_flops(self.flops.scored(prompts, targets, backward=True))
        self.account.add_flops(self.flops.scored(prompts, targets, backward=False))
        with self.reference.model(self.model) as reference:
            ref_hidden, ref_weight = completion_hidden(reference, prompts, targets), output_weight(reference).detach()
        hidden = completion_hidden(self.model, prompts, targets)
        divergence = forward_kl(hidden, output_weight(self.model), ref_hidden, ref_weight)
        zeros = torch.zeros(targets.mask.shape, device=divergence.device)
        return hidden_logprobs(self.model, hidden, targets), zeros.masked_scatter(targets.mask, divergence)

    def configure_model(self) -> None:
        """Loads the backbone, and for training the reference if the KL term needs one."""
        super().configure_model()
        is_fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if self.kl_coef and is_fitting and "reference" not in self._modules:
            self.reference = Reference(self.model, self.reference_kind)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the reference out where there is none: to evaluate, or to go on without a KL term."""
        if "reference" not in self._modules:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: weights[k] for k in weights if not k.startswith("reference.")}

    def on_train_epoch_start(self) -> None:
        """A task begins, and the reference with it; one that is resumed half-way does not come here."""
        super().on_train_epoch_start()
        if self.kl_coef:
            self.reference.start_task(self.model)
