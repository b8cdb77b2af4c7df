"""Callbacks that know what a fit would stop at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class ChecksFit(Callback):
    """A callback that refuses settings before a fit begins.

    It is asked before weights are loaded; by ``cpt fit``, and in its own time, before the base is evaluated. About a
    checkpoint it is asked then by ``cpt fit``, and by every Trainer when the checkpoint is read.
    """

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the settings of Trainer, stream and module, which has no model yet.

        Raises:
            ValueError: Names what would stop the fit or spoil its results, and the mend.
        """

    def check_resume(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any], path: str | Path
    ) -> None:
        """Looks at the checkpoint that a fit is to go on from, whose weights need not be there.

        Raises:
            ValueError: Names what would stop the fit or spoil its results, and the mend.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has a fit checked."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.check_fit(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Has a checkpoint checked that ``fit`` goes on from."""
        # Not in on_fit_start: under fsdp2 the checkpoint is read after that.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run:
            self.check_resume(trainer, pl_module, checkpoint, str(trainer.ckpt_path))


def check_evaluated_at_ends(trainer: Trainer) -> None:
    """Refuses a rhythm of evaluations that leaves out the end of a stage.

    Raises:
        ValueError: Names the stage.
    """
    if trainer._val_check_time_interval is not None:
        raise ValueError(
            "trainer.val_check_interval is a time, and a task would end without the evaluation that is its row of the "
            "accuracy matrix; leave it at 1.0"
        )
    stream, every = trainer.datamodule, trainer.val_check_interval
    for stage, name in enumerate(stream.stage_names):
        steps, limit = stream.num_steps(stage), trainer.limit_train_batches
        steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        if steps % (every if isinstance(every, int) else max(1, int(steps * every))):
            raise ValueError(
                f"trainer.val_check_interval={every}: {name} has {steps} batches, and would end without the evaluation "
                "that is its row of the accuracy matrix; leave it at 1.0"
            )
