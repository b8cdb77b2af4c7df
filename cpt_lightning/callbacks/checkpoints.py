"""One checkpoint per task, and the last."""

from __future__ import annotations

import warnings
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.callbacks.signals import Stopped, StopSignals
from cpt_lightning.checkpoint_files import standing
from cpt_lightning.checkpoint_io import AtomicCheckpointIO


class TaskCheckpoint(ModelCheckpoint):
    """Saves ``1_<task>.ckpt``, ``2_<task>.ckpt``, ... after each task, and ``last.ckpt``, all resumable.

    ``last.ckpt`` is also renewed before the last batch of a task, so that a run that is killed in the evaluation after
    it loses little else, and when SIGTERM or SLURM (``#SBATCH --signal=SIGUSR1@90``) ask the run to stop: it then
    finishes its batch, saves, and ends, having told SLURM to start it anew. Files are replaced in one go and read as
    data only (:class:`~cpt_lightning.checkpoint_io.AtomicCheckpointIO`), unless the Trainer was given a
    ``CheckpointIO``.

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
                f"checkpoint.every_n_steps={every_n_steps} must be at least 1; null saves around task ends only"
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
        self.signals = StopSignals()
        self._unwritten_logs = False
        self._learns = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the folder, and how files are written and read."""
        AtomicCheckpointIO.take_over(trainer.strategy)
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        self.dirpath = self.dirpath or folder
        self._refuse_rivals(trainer)
        with warnings.catch_warnings():  # the folder is a run's, and holds more than checkpoints
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def _refuse_rivals(self, trainer: Trainer) -> None:
        for other in trainer.checkpoint_callbacks:
            if other is self or not isinstance(other, ModelCheckpoint) or not (other.save_last and other.dirpath):
                continue
            if Path(other.dirpath).resolve() == Path(self.dirpath or "").resolve():
                raise ValueError(
                    f"{type(other).__name__}: save_last writes the last.ckpt of TaskCheckpoint too, also between a "
                    "task's last batch and its evaluation; leave save_last out, or give it another dirpath"
                )

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """What ``trainer.fit(..., ckpt_path="last")`` goes on from; Lightning asks before :meth:`setup`."""
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        folder = self.dirpath or folder or trainer.default_root_dir
        last = standing(Path(folder) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        return {str(last)} if last.exists() else set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to signals."""
        super().on_train_start(trainer, pl_module)
        self._learns = False
        self.signals.watch(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to signals in an evaluation before training too."""
        super().on_validation_start(trainer, pl_module)
        self._write_logs(trainer)
        self.signals.watch(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to signals there too, where Lightning would end as if nothing had happened."""
        self.signals.watch(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to signals there too."""
        self.signals.watch(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        """Writes the logs of the batch after which the last checkpoint was saved: a resumed run has it behind it."""
        self._learns = True
        self._write_logs(trainer)

    def _write_logs(self, trainer: Trainer) -> None:
        if self._unwritten_logs:
            self._unwritten_logs = False
            for logger in trainer.loggers:
                logger.save()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, *_
    ) -> None:
        """Renews the last checkpoint within a task, and stops if asked to."""
        asked = self.signals.asked_to_stop(trainer)
        # At a task's last batch its own checkpoint follows, after the validation that a resume from here would leave
        # out.
        if trainer.is_last_batch or trainer.fast_dev_run or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if asked or self._is_due(batch_idx + 1, trainer):
            self.last_model_path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)
            self._unwritten_logs = True
        if asked:
            self.signals.stop(trainer, self._how_to_go_on(trainer))

    def _is_due(self, num_batches: int, trainer: Trainer) -> bool:
        size = trainer.accumulate_grad_batches
        before_last = (int(trainer.num_training_batches) - 1) // size * size
        return num_batches == before_last or (self.every_n_steps is not None and num_batches % self.every_n_steps == 0)

    def on_validation_batch_end(self, trainer: Trainer, *_) -> None:
        """Stops if asked to: the evaluation is made again, after the batches since the last checkpoint."""
        if not trainer.sanity_checking:
            self.stop_if_asked(trainer)

    def on_test_batch_end(self, trainer: Trainer, *_) -> None:
        """Stops if asked to."""
        self.stop_if_asked(trainer)

    def on_predict_batch_end(self, trainer: Trainer, *_) -> None:
        """Stops if asked to."""
        self.stop_if_asked(trainer)

    def stop_if_asked(self, trainer: Trainer) -> None:
        """Stops where there is nothing to save: what follows the last checkpoint is made again; all ranks must ask."""
        if self.signals.asked_to_stop(trainer):
            self.signals.stop(trainer, self._how_to_go_on(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the task's checkpoint."""
        stage = trainer.current_epoch
        self.filename = f"{stage + 1}_{trainer.datamodule.stage_names[stage]}"
        if self.save_top_k == 0 and not trainer.fast_dev_run:  # then ModelCheckpoint would not save the last either
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_epoch_end(trainer, pl_module)
        self._unwritten_logs = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last checkpoint if a run ended before its first task did, and is more than a try."""
        if trainer.fast_dev_run:
            return
        super().on_train_end(trainer, pl_module)
        if trainer.should_stop and (left := trainer.max_epochs - trainer.current_epoch):
            rank_zero_info(f"a callback stopped the run, {left} stage(s) before its end; {self._how_to_go_on(trainer)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says how to go on, whatever ended the run, unless it was refused before it learned anything."""
        super().on_exception(trainer, pl_module, exception)
        was_refused = isinstance(exception, Exception) and not self._learns  # Ctrl-C is none
        if trainer.training and not was_refused and not isinstance(exception, Stopped):
            rank_zero_info(self._how_to_go_on(trainer))

    def _how_to_go_on(self, trainer: Trainer) -> str:
        if trainer.state.fn != TrainerFn.FITTING:
            return "answers are kept when all are there: start it again"
        last = Path(self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST))
        return (
            f"go on with --ckpt_path {last}"
            if standing(last).exists()
            else f"there is no checkpoint yet: --run_dir {last.parent} --ckpt_path last begins anew in that folder"
        )

    def state_dict(self) -> dict:
        """Nothing: the names of the files follow from the stage, and none is the best."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Nothing, for that reason."""
