"""What a run does beside steps and evaluations, and is rehearsed with them."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from cpt_lightning.callbacks import RolloutFilter
from cpt_lightning.callbacks.analysis.recorder import Recorder
from cpt_lightning.callbacks.filter.judge import Judge
from cpt_lightning.callbacks.methods.kept_weights import KeptWeights

FILTER = "filter"


class FilterTrial(Callback):
    """Judges a batch of rows when all has been learned and the optimizer has its state.

    Args:
        judge: The filter's.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last stage has been learned."""
        stream, stage = trainer.datamodule, trainer.current_epoch
        if stage == stream.num_stages - 1:
            for _ in self.judge.verdicts(trainer, stage, stream.rows_to_judge(stage, {})):
                pass


def rehearsed(callbacks: list[Callback], rollout_filter: RolloutFilter) -> list[Callback]:
    """Of a run's callbacks those of ours that keep weights or ask the model, and its filter if it judges rows."""
    found = [callback for callback in callbacks if isinstance(callback, KeptWeights | Recorder)]
    judges = rollout_filter.is_on and rollout_filter.filter_from is None
    return [*found, FilterTrial(rollout_filter.judge)] if judges else found


def name_of(callback: Callback) -> str:
    """What a rehearsed callback is called in tables."""
    return FILTER if isinstance(callback, FilterTrial) else type(callback).__name__
