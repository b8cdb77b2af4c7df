"""One checkpoint per task, and the last."""

from __future__ import annotations

import warnings

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class TaskCheckpoint(ModelCheckpoint):
    """Saves ``1_<task>.ckpt``, ``2_<task>.ckpt``, ... after each task, and ``last.ckpt``, all resumable.

    Args:
        dirpath: Folder; the run's log directory by default.
        every_n_steps: Renew ``last.ckpt`` after so many batches within a task too, so that a killed run loses less.
        keep_tasks: Keep one checkpoint per task; otherwise only ``last.ckpt``.
        save_weights_only: Leave out the optimizer and all else that resuming needs.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    dirpath: str | None

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int | None = None,
        keep_tasks: bool = True,
        save_weights_only: bool = False,
    ):
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"checkpoint.every_n_steps={every_n_steps} must be at least 1; null saves at task ends only"
            )
        super().__init__(
            dirpath=dirpath,
            save_last=True,
            save_top_k=-1 if keep_tasks else 0,
            save_weights_only=save_weights_only,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the folder."""
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        self.dirpath = self.dirpath or folder
        with warnings.catch_warnings():  # the folder is a run's, and holds more than checkpoints
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, *_
    ) -> None:
        """Renews the last checkpoint within a task."""
        # At a task's last batch its own checkpoint follows, after the validation that a resume from here would leave
        # out.
        due = self.every_n_steps is not None and (batch_idx + 1) % self.every_n_steps == 0
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if due and not accumulating and not trainer.is_last_batch and not trainer.fast_dev_run:
            self.last_model_path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the task's checkpoint."""
        stage = trainer.current_epoch
        self.filename = f"{stage + 1}_{trainer.datamodule.stage_names[stage]}"
        if self.save_top_k == 0 and not trainer.fast_dev_run:  # then ModelCheckpoint would not save the last either
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last checkpoint if a run ended before its first task did, and is more than a try."""
        if not trainer.fast_dev_run:
            super().on_train_end(trainer, pl_module)

    def state_dict(self) -> dict:
        """Nothing: the names of the files follow from the stage, and none is the best."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Nothing, for that reason."""
