"""The rollout filter, as a callback that is rehearsed like others."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from cpt_lightning.callbacks.filter.judge import Judge

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


def name_of(callback: Callback) -> str:
    """What a rehearsed callback is called in tables."""
    return FILTER if isinstance(callback, FilterTrial) else type(callback).__name__
