"""What a person watching the run sees."""

from __future__ import annotations

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.callbacks.display.meter import Meter
from cpt_lightning.types import Batch


class TaskProgressBar(ProgressBar):
    """One meter at a time, which names the task that is learned or evaluated, with rows per second and time left.

    Beside a bar of training stand what modules log with ``prog_bar=True`` (reward or loss) and, at a terminal, the
    phase of the step. Elsewhere than at a terminal there is a line a minute, and one at the end of each piece of work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_disabled = False
        self._meter: Meter | None = None

    def disable(self) -> None:
        """Shows nothing from now on."""
        self.is_disabled = True

    def enable(self) -> None:
        """Shows again what is done."""
        self.is_disabled = False

    # -- training ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks the module to say what its steps are at."""
        pl_module.on_phase = self._show_phase

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Begins a meter with a task, or after an evaluation in its middle."""
        if self._meter is None:
            stage, names = trainer.current_epoch, trainer.datamodule.stage_names
            name = f"task {stage + 1}/{len(names)} {names[stage]}"
            self._begin(trainer, name, int(self.total_train_batches), "steps", batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch: Batch, *_) -> None:
        """Shows that a step is done."""
        self._advance(trainer, batch, said=shown_metrics(trainer))
        if trainer.is_last_batch:
            self._end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends what a ``max_steps`` or a callback cut short."""
        self._end()
        pl_module.on_phase = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the line to what is said about it."""
        self._end()

    def _show_phase(self, phase: str) -> None:
        if self._meter is not None:
            self._meter.show_phase(phase)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a meter of all tasks and probes."""
        if not trainer.sanity_checking:
            self._begin(trainer, "evaluating", sum_of(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a meter of all tasks and probes."""
        self._begin(trainer, "testing", sum_of(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a meter of all rows."""
        self._begin(trainer, "predicting", sum_of(trainer.num_predict_batches))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch: Batch, *_) -> None:
        """Names the task that was evaluated."""
        self._advance(trainer, batch, name=f"evaluating {task_of(batch)}")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch: Batch, *_) -> None:
        """Names the task that was tested."""
        self._advance(trainer, batch, name=f"testing {task_of(batch)}")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch: Batch, *_) -> None:
        """Names the task whose rows were answered."""
        self._advance(trainer, batch, name=f"predicting {task_of(batch)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the meter, before scores are printed."""
        self._end("evaluated")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the meter, before scores are printed."""
        self._end("tested")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the meter."""
        self._end("predicted")

    # -- the meter ---------------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, name: str, total: int, unit: str = "batches", num_done: int = 0) -> None:
        self._end()
        self._meter = Meter(name, total, unit, num_done, trainer.is_global_zero and not self.is_disabled)

    def _advance(self, trainer: Trainer, batch: Batch, said: str = "", name: str | None = None) -> None:
        if self._meter is not None:
            self._meter.advance(1, len(batch) * trainer.world_size, said, name)

    def _end(self, name: str | None = None) -> None:
        if self._meter is not None:
            self._meter.close(name)
        self._meter = None


def shown_metrics(trainer: Trainer) -> str:
    """What was logged for a progress bar, by the last part of its name.

    Two values are told apart by four digits.
    """
    shown = trainer.progress_bar_metrics
    return ", ".join(f"{name.rpartition('/')[2].replace('_', ' ')} {float(shown[name]):.4g}" for name in sorted(shown))


def sum_of(batches: int | float | list[int | float]) -> int:
    """Batches of all loaders."""
    return int(sum(batches)) if isinstance(batches, list) else int(batches)


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
        if reasons_to_skip(trainer):
            self.log("train/skipped_rows", float(batch.num_skipped), batch_size=1, sync_dist=True, reduce_fx="sum")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what was left out."""
        mine = torch.tensor(self._num_skipped, device=pl_module.device)
        if num_skipped := int(trainer.strategy.reduce(mine, reduce_op="sum")):
            rank_zero_info(
                f"{trainer.datamodule.stage_names[trainer.current_epoch]}: {num_skipped} rows were left out: "
                f"{', or '.join(reasons_to_skip(trainer))}; cpt inspect names them"
            )


def reasons_to_skip(trainer: Trainer) -> list[str]:
    """Why the stream may leave out training rows; there are none if it leaves out no row."""
    stream, reasons = trainer.datamodule, []
    if stream.max_prompt_tokens is not None:
        reasons.append(f"their prompts are longer than data.max_prompt_tokens={stream.max_prompt_tokens}")
    if any(task.bad_images == "skip" for task in stream.everything.values()):
        reasons.append("their images were refused (bad_images: skip)")
    return reasons
