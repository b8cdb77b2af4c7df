"""Weight change: how far a task moved the weights, how many of them, and in how many directions."""

from __future__ import annotations

import re

import torch
from lightning import LightningModule, Trainer

from cpt_lightning.callbacks.analysis.changes import changes_since
from cpt_lightning.callbacks.analysis.recorder import Recorder
from cpt_lightning.callbacks.methods.kept_weights import KeptWeights
from cpt_lightning.functional import effective_rank, num_changed
from cpt_lightning.models.adapted_layers import low_rank_layers
from cpt_lightning.models.adapters import has_adapters
from cpt_lightning.models.weights import copy_of, trained
from cpt_lightning.records.run import WEIGHT_CHANGE


class WeightChange(Recorder, KeptWeights):
    """Measures after every task how its weights have changed since its start.

    - ``weight_change/norm``: the Euclidean norm over all trained weights;
    - ``weight_change/relative_norm``: the same over that of the weights at the start;
    - ``weight_change/changed_fraction``: the share of the weights whose value in bfloat16 is another one; its
      complement is the sparsity of the update;
    - ``weight_change/effective_rank``: the mean over chosen matrices of exp(entropy of the singular values).

    With LoRA all of it is of the weights that the adapters add to, adapter included. Writes ``weight_change.json``
    beside ``config.yaml``, with the effective rank of each matrix. The weights at the start are kept in memory and in
    the checkpoint, as :class:`KeptWeights` says. What a run took is printed at its end.

    Args:
        matrices: A regular expression that is searched for in the names of weights: of which the effective rank is
            measured. By default of the layers that write into the residual stream. ``null`` measures none.

    Raises:
        ValueError: No trained matrix has such a name, or an adapter is not one of LoRA on linear layers; a checkpoint
            that was measured otherwise.
    """

    filename = WEIGHT_CHANGE

    def __init__(self, matrices: str | None = r"language_model\..*\.(o_proj|down_proj)") -> None:
        super().__init__()
        try:
            self._chosen = None if matrices is None else re.compile(matrices)
        except re.error as error:
            raise ValueError(f"WeightChange: matrices={matrices!r} is no regular expression: {error}") from error
        self.matrices = matrices

    # -- when --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses what cannot be measured."""
        super().on_train_start(trainer, pl_module)
        names = _trained_matrices(pl_module)
        if self._chosen is not None and not any(self._chosen.search(name) for name in names):
            raise ValueError(
                f"WeightChange: matrices={self.matrices!r} is in the name of no trained matrix; one of the "
                f"{len(names)} is {names[-1]!r}"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        """Remembers a task's start; one that is resumed half-way has it in its checkpoint."""
        # Not in on_train_epoch_start: an adapter that is renewed comes after that of callbacks.
        if batch_idx == 0:
            self.kept = {}  # gives its memory back first
            self.kept["start"] = copy_of(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures what the task did; before its checkpoint is saved."""
        with self.timed():
            found = self.measure(pl_module)
            here = {"stage": trainer.current_epoch + 1, "name": trainer.datamodule.stage_names[trainer.current_epoch]}
            self.measurements = [*self.measurements, here | found]
            shown = {f"weight_change/{name}": value for name, value in found.items() if isinstance(value, float)}
            self.log_dict(shown, batch_size=1)
            self.save(trainer)

    # -- measuring ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, module: LightningModule) -> dict:
        """The figures since the task's start; all ranks must ask."""
        num_weights, different, moved, size = 0, 0, 0.0, 0.0
        ranks = {}
        for change in changes_since(module, self.kept["start"]):
            num_weights += change.now.numel()
            different += num_changed(change.before, change.now)
            moved += change.by.double().square().sum().item()
            size += change.before.double().square().sum().item()
            if self._chosen is not None and change.by.ndim == 2 and self._chosen.search(change.name):
                ranks[change.name] = effective_rank(change.by)
        found = {
            "norm": moved**0.5,
            "relative_norm": (moved / size) ** 0.5,
            "changed_fraction": different / num_weights,
        }
        if ranks:
            found |= {"effective_rank": sum(ranks.values()) / len(ranks), "effective_ranks": ranks}
        return {"num_weights": num_weights, **found}

    @property
    def settings(self) -> dict[str, str | None]:
        """Of which matrices ranks are measured."""
        return {"matrices": self.matrices}


def _trained_matrices(module: LightningModule) -> list[str]:
    if has_adapters(module.model):
        return [f"model.{layer.name}" for layer in low_rank_layers(module.model)]
    return [name for name, weight in trained(module).items() if weight.ndim == 2]
