"""Weight distance: how far the weights have gone from the base, and as far as prior knowledge feels it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning import LightningModule, Trainer

from cpt_lightning.callbacks.analysis.changes import changes_since
from cpt_lightning.callbacks.analysis.recorder import Recorder
from cpt_lightning.callbacks.methods.fisher import fisher_of_answers, sum_of
from cpt_lightning.callbacks.methods.kept_weights import KeptWeights, refuse_other_adapters
from cpt_lightning.models.weights import copy_of, trained
from cpt_lightning.records.run import WEIGHT_DISTANCE
from cpt_lightning.rollouts import Sampling
from cpt_lightning.types import Batch


class WeightDistance(Recorder, KeptWeights):
    """Measures after every task how far the weights are from those of the base.

    - ``weight_distance/distance``: the Euclidean norm of the difference of all trained weights; with LoRA of what the
      adapters add to the weights;
    - ``weight_distance/fisher_distance``: ``1/2 sum_i F_i (theta_i - base_i)^2`` over the trained parameters, F the
      diagonal of the Fisher information at the base, from its own answers to rows of the probes: KL(base || model) on
      prior knowledge in nats per answer, to second order and as far as a diagonal tells. With LoRA the parameters are
      the adapters', and A counts nothing, for at the base B is 0. Probes that came to the stream later have no part.

    RL's Razor (arXiv 2509.04259) finds both to foretell forgetting worse than the divergence that :class:`Drift`
    measures; ``cpt report`` sets them beside each other. Writes ``weight_distance.json`` beside ``config.yaml``. The
    base's trained weights and F are kept in memory and in the checkpoint, as :class:`KeptWeights` says. Nothing that
    training draws or computes is changed. What a run took is printed at its end.

    Args:
        num_rows: Rows of each probe that F is estimated from, one backward pass each; 0 leaves out the distance by F.
        max_new_tokens: Longest answer.

    Raises:
        ValueError: A count out of range; no probes to estimate F from; adapters that are not shared by all tasks, or
            not ones of LoRA on linear layers; a checkpoint that was measured otherwise.
    """

    filename = WEIGHT_DISTANCE

    def __init__(self, num_rows: int = 8, max_new_tokens: int = 64) -> None:
        super().__init__()
        if num_rows < 0 or max_new_tokens < 1:
            raise ValueError(
                f"WeightDistance: num_rows={num_rows} must not be negative, max_new_tokens={max_new_tokens} be positive"
            )
        self.num_rows = num_rows
        self.sampling = Sampling(max_new_tokens)

    @property
    def sets(self) -> list[torch.dtype | None]:
        """The base, and F."""
        return [None, torch.float32] if self.num_rows else [None]

    # -- when --------------------------------------------------------------------------------------------------------

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses weights that have no base, and a stream without prior knowledge."""
        refuse_other_adapters(self, pl_module)
        if self.num_rows and not (trainer.datamodule and trainer.datamodule.probe_names):
            raise ValueError(
                "WeightDistance: F is of what the base says to the probes, and there are none; add data.probes, or set "
                "num_rows to 0"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers the base; a resumed run has it in its checkpoint."""
        super().on_train_start(trainer, pl_module)
        if "base" in self.kept:
            return
        with self.timed():
            self.kept["base"] = copy_of(pl_module)
            if self.num_rows:
                with pl_module.account.aside(), trainer.precision_plugin.forward_context():
                    self.kept["fisher"] = fisher_of_answers(pl_module, self._rows(trainer), self.sampling)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures what is learned so far; before the task's checkpoint is saved."""
        with self.timed():
            found = self.measure(pl_module)
            here = {"stage": trainer.current_epoch + 1, "name": trainer.datamodule.stage_names[trainer.current_epoch]}
            self.measurements = [*self.measurements, here | found]
            self.log_dict({f"weight_distance/{name}": value for name, value in found.items()}, batch_size=1)
            self.save(trainer)

    # -- measuring ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, module: LightningModule) -> dict[str, float]:
        """The distances from the base; all ranks must ask."""
        base = self.kept["base"]
        squares = (change.by.double().square().sum().item() for change in changes_since(module, base))
        found = {"distance": sum(squares) ** 0.5}
        if self.num_rows:
            fisher = self.kept["fisher"]
            risks = (
                fisher[name] * (weight.float() - base[name].float()).square()
                for name, weight in trained(module).items()
            )
            found["fisher_distance"] = sum_of(risks, module.device).item() / 2
        return found

    def _rows(self, trainer: Trainer) -> Iterator[tuple[int, Batch]]:
        for number, probe in enumerate(trainer.datamodule.probe_names):
            batch = trainer.datamodule.rows_of_evaluation(probe, self.num_rows)
            yield number, trainer.strategy.batch_to_device(batch)

    @property
    def settings(self) -> dict[str, int]:
        """What F is estimated from."""
        return {"num_rows": self.num_rows, "max_new_tokens": self.sampling.max_new_tokens}
