"""How the model scores fixed answers at one moment, and what has changed at another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from cpt_lightning.callbacks.analysis.measuring import Asked
from cpt_lightning.functional import kernel_bound, log_prob_change
from cpt_lightning.models.qwen_vl import output_weight
from cpt_lightning.models.sharding import is_sharded
from cpt_lightning.rollouts import completion_hidden
from cpt_lightning.rollouts.sampling import sampling_mode
from cpt_lightning.types import Completions

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

MEANS = ("log_prob_change", "rise_fraction", "change_squared", "jacobian_squared", "lbk")
"""What :func:`change_of` finds for each answer."""


@dataclass
class AnswerScores:
    """What log-probabilities are made of: the table of tokens by vocabulary itself is never held.

    Args:
        hidden: ``[M, H]`` final hidden states that predict the M tokens of the answers.
        weight: ``[V, H]`` output matrix.
        answers: B answers.
    """

    hidden: Tensor
    weight: Tensor
    answers: Completions


def lasting_weight(model: QwenVL) -> Tensor:
    """``[V, H]`` output matrix as it is now, whatever becomes of the model's."""
    weight = output_weight(model)
    # The optimizer changes a trained matrix itself, and one that was gathered goes back into shards.
    return weight.clone() if weight.requires_grad or is_sharded(model) else weight


def scores_of(
    trainer: Trainer, module: LightningModule, name: str, asked: Asked, weight: Tensor
) -> AnswerScores | None:
    """Of the answers to a task or probe that this rank has, by the model as it is now.

    Args:
        trainer: Whose device it is.
        module: Whose model.
        name: Of the task or probe.
        asked: The answers.
        weight: ``[V, H]`` output matrix, for as long as the scores are looked at.
    """
    if asked.prompts is None or asked.answers is None:
        return None
    model = module.model
    prompts, answers = (trainer.strategy.batch_to_device(each) for each in (asked.prompts, asked.answers))
    with sampling_mode(model), module.adapters_of(name):
        return AnswerScores(completion_hidden(model, prompts, answers), weight, answers)


def change_of(before: AnswerScores, after: AnswerScores, gradient_squared: float) -> Tensor:
    """``[B, 5]`` for each answer what :data:`MEANS` names.

    Args:
        before: Scores before an update.
        after: Scores of the same answers after it.
        gradient_squared: ``||G||^2`` of the update.
    """
    answers = before.answers
    found = log_prob_change(before.hidden, before.weight, after.hidden, after.weight, answers.ids[answers.mask])
    change, squared, jacobian = (answers.unpacked(each).sum(dim=1) for each in found)
    lbk = kernel_bound(squared, jacobian, gradient_squared)
    return torch.stack([change, (change > 0).double(), squared, jacobian, lbk], dim=1)
