"""Model merging: what a task made of the weights is merged with what earlier tasks made of them."""

from __future__ import annotations

from typing import Literal

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from cpt_lightning.callbacks.methods.kept_weights import KeptWeights, refuse_other_adapters
from cpt_lightning.models.weights import copy_of, trained
from cpt_lightning.tasks.checks import check_known

Method = Literal["average", "task_arithmetic"]
Start = Literal["merged", "base"]


class ModelMerging(KeptWeights):
    """Merges weights after a task's last batch: the merged model is what is evaluated and saved, and what goes on.

    With the merged model M (before the first task the untrained base), the weights S with which a task began and E with
    which it ended:

    - the average, M + (E - M) / t after the t-th task: the mean of all task-end models (model soups, Wortsman et al.
      2022, arXiv 2203.05482, taken one by one);
    - task arithmetic, M + scale * (E - S): the base plus scaled task vectors (Ilharco et al. 2023, arXiv 2212.04089).

    Where a task begins from the merged model, S = M, so the average gives the t-th task the weight 1 / t and task
    arithmetic the weight ``scale``. Where it begins from the base, tasks are learned without each other and meet in the
    merged model only, as in both papers.

    Merged are trained weights: with LoRA the adapters' matrices A and B, each for itself (PEFT's ``linear``), which is
    not the merge of their products.

    Args:
        method: ``average`` or ``task_arithmetic``.
        scale: Factor of every task vector in task arithmetic.
        start: A task begins from the ``merged`` model, or from the untrained ``base``.

    Raises:
        ValueError: A ``scale`` that is not positive, or one given to the average; adapters that are not shared by all
            tasks.
    """

    def __init__(
        self,
        method: Method = "average",
        scale: float | None = None,
        start: Start = "merged",
    ) -> None:
        super().__init__()
        check_known("ModelMerging: ", method=(method, Method), start=(start, Start))
        if method == "average" and scale is not None:
            raise ValueError(f"ModelMerging: scale={scale} belongs to task_arithmetic; the average needs none")
        if method == "task_arithmetic" and (scale is None or scale <= 0):
            raise ValueError(f"ModelMerging: task_arithmetic needs a positive scale, e.g. 0.4; it is {scale}")
        self.method = method
        self.scale = scale
        self.start = start

    @property
    def sets(self) -> list[torch.dtype | None]:
        """The merged model, and the base where tasks begin from it."""
        return [None, None] if self.start == "base" else [None]

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what cannot be merged."""
        refuse_other_adapters(self, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task begins, from the base if it is to; one that is resumed half-way does not come here."""
        if "merged" not in self.kept:
            self.kept["merged"] = copy_of(pl_module)
            if self.start == "base":
                self.kept["base"] = copy_of(pl_module)
        elif self.start == "base":
            _set(pl_module, self.kept["base"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        """Merges after the task's last batch, before the validation that follows it."""
        if trainer.is_last_batch:
            # One after the other: there is never another whole model.
            for name, parameter in trained(pl_module).items():
                self.kept["merged"][name] = self._merge(name, parameter.detach(), trainer.current_epoch + 1)
            _set(pl_module, self.kept["merged"])

    def _merge(self, name: str, end: Tensor, num_tasks: int) -> Tensor:
        merged = self.kept["merged"][name]
        weight = 1 / num_tasks if self.scale is None else self.scale
        if self.scale is None or self.start == "merged":
            return torch.lerp(merged, end, weight)  # at weight 1 the end, bit for bit
        return merged + weight * (end - self.kept["base"][name])


@torch.no_grad()
def _set(module: LightningModule, weights: dict[str, Tensor]) -> None:
    for name, parameter in trained(module).items():
        parameter.copy_(weights[name])
