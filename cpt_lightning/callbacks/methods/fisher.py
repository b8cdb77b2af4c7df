"""The diagonal of the Fisher information: how much each weight matters for what the policy says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from lightning import LightningModule
from torch import Tensor

from cpt_lightning.models.qwen_vl import without_dropout
from cpt_lightning.models.sharding import (
    exchange_gradients,
    exchanging_block_by_block,
    gather,
    trained_backbones,
    whole,
)
from cpt_lightning.models.weights import Weights, trained
from cpt_lightning.rollouts import Sampling
from cpt_lightning.types import Batch


def own_answers(module: LightningModule, batch: Batch, sampling: Sampling, *key: int) -> Batch:
    """The batch with answers of the policy itself as its targets; the same on every rank, all of which must ask."""
    for backbone in trained_backbones(module):
        gather(backbone)
    return module.drawn(batch, sampling, *key)


def diagonal_fisher(module: LightningModule, batch: Batch) -> Weights:
    """The mean over rows of the squared gradient of the log-probability of a row's whole target, in float32.

    Of targets that the policy drew (:func:`own_answers`) it estimates the diagonal of the Fisher information ``E[grad
    log p(y|x) grad log p(y|x)']``, the Hessian of the KL divergence from the policy as it is; of reference answers it
    is the empirical one. Nothing is dropped out. Gradients are given up before and after.

    Args:
        module: Whose ``log_likelihoods`` are taken.
        batch: The same rows on every rank, so that the result does not depend on their number.
    """
    parameters = trained(module)
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    backbones = trained_backbones(module)
    with without_dropout(module), exchanging_block_by_block(backbones):
        for row in range(len(batch)):
            module.zero_grad(set_to_none=True)
            for backbone in backbones:
                gather(backbone)
            module.log_likelihoods(batch.select([row])).sum().backward()
            for backbone in backbones:
                exchange_gradients(backbone)
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    total[name] += parameter.grad.float().square()
    module.zero_grad(set_to_none=True)
    return {name: value / len(batch) for name, value in total.items()}


def fisher_of_answers(module: LightningModule, batches: Iterable[tuple[int, Batch]], sampling: Sampling) -> Weights:
    """The mean over batches, one a task or probe, of the Fisher information by the policy's own answers.

    Args:
        module: The policy.
        batches: A number that keys the draws, and rows, the same on every rank.
        sampling: How the policy answers.
    """
    total: Weights = {}
    count = 0
    for number, batch in batches:
        count += 1
        for name, value in diagonal_fisher(module, own_answers(module, batch, sampling, number)).items():
            total[name] = total[name] + value if name in total else value
    return {name: value / count for name, value in total.items()}


@torch.no_grad()
def gradient_risk(module: LightningModule, fisher: Weights) -> Tensor:
    """``R(g) = g'Fg`` of the gradients that the parameters hold; every rank must ask.

    The risk that paper A (arXiv 2507.05386) gives an update direction: as far as the diagonal of F tells, twice the KL
    divergence, in nats per answer and to second order, that the step ``g`` makes.
    """
    return sum_of((fisher[name] * gradient.square() for name, gradient in _gradients(module)), module.device)


@torch.no_grad()
def squared_norm(module: LightningModule) -> Tensor:
    """``|g|^2`` of the gradients that the parameters hold; every rank must ask."""
    return sum_of((gradient.square() for _, gradient in _gradients(module)), module.device)


def sum_of(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of all elements of tensors that may be in shards; every rank must ask."""
    sums = [tensor.sum() for tensor in tensors]
    return whole(sum(sums[1:], sums[0])) if sums else torch.zeros((), device=device)


def _gradients(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in trained(module).items():
        if parameter.grad is not None:
            yield name, parameter.grad.float()
