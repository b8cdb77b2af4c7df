"""A real Trainer around a few ready-made batches, for tests of modules."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cpt_lightning.models.processor import PromptProcessor
from cpt_lightning.types import Batch, Example, Prompts


def length_reward(completion: str, gold: str | list[str]) -> dict[str, float]:
    """Half a point for each even property of a random model's text: something every group differs in."""
    score = 0.5 * (len(completion) % 2) + 0.5 * (completion.count("e") % 2)
    return {"total": score, "accuracy": score}


def with_examples(
    prompts: Prompts, processor: PromptProcessor, reward: Any = length_reward, task: str = "demo"
) -> Batch:
    """The prompts as a training batch whose targets are the digits of the row."""
    targets = [str(row) * (row + 1) for row in range(len(prompts))]
    examples = [
        Example(task, f"{task}/{row}", [{"role": "user", "content": "?"}], gold=target, reward=reward, target=target)
        for row, target in enumerate(targets)
    ]
    whole = prompts.select(range(len(prompts)))
    whole.examples = examples
    return Batch(whole, processor.encode_targets(targets))


def fit(module: L.LightningModule, batches: list[Batch], **trainer_options: Any) -> L.Trainer:
    """Fits the module to the batches, one epoch."""
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "inference_mode": False}
    trainer = L.Trainer(**{**options, **quiet, **trainer_options})
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(module, train_dataloaders=loader, val_dataloaders=loader)
    return trainer


def weights(module: L.LightningModule) -> dict[str, Tensor]:
    """A copy of the model's weights."""
    return {name: weight.detach().clone() for name, weight in module.model.named_parameters()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest absolute difference of two sets of weights."""
    return max((one[name] - other[name]).abs().max().item() for name in one)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer whose step is the gradient, so that equal weights mean equal gradients."""
    return torch.optim.SGD(parameters, lr=0.1)
