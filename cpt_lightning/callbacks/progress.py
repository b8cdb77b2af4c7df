"""What a person watching the run sees."""

from __future__ import annotations

import sys

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.types import Batch


class TaskProgressBar(TQDMProgressBar):
    """A progress bar that names the task that is learned or evaluated.

    Args:
        refresh_rate: Batches between updates; by default 1 at a terminal and 20 elsewhere, so that a log stays short.
    """

    def __init__(self, refresh_rate: int | None = None) -> None:
        super().__init__(refresh_rate or (1 if sys.stdout.isatty() else 20))

    def on_train_epoch_start(self, trainer: Trainer, *args) -> None:
        """Names the task that begins."""
        super().on_train_epoch_start(trainer, *args)
        stage, names = trainer.current_epoch, trainer.datamodule.stage_names
        self.train_progress_bar.set_description(f"task {stage + 1}/{len(names)} {names[stage]}")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, *args
    ) -> None:
        """Names the task that is evaluated."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, *args)
        self.val_progress_bar.set_description(f"evaluating {task_of(batch)}", refresh=self.refresh_rate == 1)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, *args
    ) -> None:
        """Names the task that is tested."""
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, *args)
        self.test_progress_bar.set_description(f"testing {task_of(batch)}", refresh=self.refresh_rate == 1)


def row_bar(trainer: Trainer, description: str, num_rows: int, num_done: int) -> Tqdm:
    """A bar over rows before training, with rows per second; silent where the Trainer's own is, or on other ranks.

    Not at a terminal it is renewed twice a minute, so that a log stays short.
    """
    own = trainer.progress_bar_callback
    return Tqdm(
        desc=description,
        total=num_rows,
        initial=num_done,
        unit="row",
        disable=own is None or own.is_disabled or not trainer.is_global_zero,
        mininterval=0.1 if sys.stdout.isatty() else 30.0,
        dynamic_ncols=True,
        file=sys.stdout,
    )


def task_of(batch: Batch) -> str:
    """The task that an evaluation batch is of: it has one only."""
    return batch.prompts.examples[0].task


class SkippedRows(Callback):
    """Counts the rows that training left out, for a long prompt or a bad image: ``train/skipped_rows`` and a line."""

    def __init__(self) -> None:
        self._num_skipped = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting for a task."""
        self._num_skipped = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch: Batch, *_) -> None:
        """Counts."""
        self._num_skipped += batch.num_skipped
        stream = trainer.datamodule
        may_skip = any(task.bad_images == "skip" for task in stream.everything.values())
        if may_skip or stream.max_prompt_tokens is not None:
            self.log("train/skipped_rows", float(batch.num_skipped), batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what was left out."""
        if self._num_skipped:
            stream = trainer.datamodule
            rank_zero_info(
                f"{stream.stage_names[trainer.current_epoch]}: {self._num_skipped} rows were left out on this rank: "
                f"their prompts are longer than data.max_prompt_tokens={stream.max_prompt_tokens}, or their images "
                "were refused (bad_images: skip); cpt inspect names them"
            )
