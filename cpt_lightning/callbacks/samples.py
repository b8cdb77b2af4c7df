"""What the model said at each evaluation, with verdicts, as JSON lines."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.callbacks.answers import Answers
from cpt_lightning.records.files import append_lines, keep_lines, replace_text

BASE_FILENAME = "validate.jsonl"
"""What ``validate`` writes; a fit that follows takes it over as its zero-shot row."""


class SampleLog(Answers):
    """Keeps every answer of every evaluation: ``samples.jsonl`` in the log directory.

    A line has ``row_id``, ``task``, ``stage`` (0 is the untrained base, k follows the k-th stage), ``after`` (name of
    that stage, ``null`` for the base), ``prompt``, ``gold``, ``completion``, ``accuracy`` and ``parts`` (all parts of
    the reward). ``cpt validate``, ``test`` and ``predict`` write ``validate.jsonl``, ``test.jsonl`` and
    ``predictions.jsonl`` instead, without ``stage`` and ``after``; an earlier one is replaced.

    A resumed run drops the lines of tasks that it learns again, so that its file ends like an uninterrupted run's.

    Args:
        filename: Of the file that ``fit`` writes.
    """

    def __init__(self, filename: str = "samples.jsonl") -> None:
        super().__init__()
        self.filename = filename
        self._base: list[dict] = []

    on_test_batch_end = Answers.on_validation_batch_end
    on_predict_batch_end = Answers.on_validation_batch_end

    # -- writing ---------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside of ``fit``: holds the answers back, as they may be the untrained base's of a fit to come."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._base = self.take(trainer)
            self._replace(trainer, BASE_FILENAME, self._base)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on after the stages that the run has behind it."""
        path = self._path(trainer, self.filename)
        if path is not None and trainer.is_global_zero:
            if trainer.ckpt_path is None:
                replace_text(path, "")
                append_lines(path, [_at(row, 0, None) for row in self._base])
                path.with_name(BASE_FILENAME).unlink(missing_ok=True)
            else:
                self._resume(path, Path(trainer.ckpt_path).with_name(self.filename), trainer.current_epoch)
        self._base = []

    def _resume(self, path: Path, earlier: Path, num_stages: int) -> None:
        if not path.exists() and earlier.exists():  # the run branches off into a folder of its own
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(earlier, path)
        keep_lines(path, lambda row: row["stage"] <= num_stages)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the answers given after the task."""
        stage = trainer.current_epoch
        name = trainer.datamodule.stage_names[stage]
        rows = self.take(trainer)
        path = self._path(trainer, self.filename)
        if path is not None and trainer.is_global_zero:
            append_lines(path, [_at(row, stage + 1, name) for row in rows])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the answers of the test split."""
        self._replace(trainer, "test.jsonl", self.take(trainer))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the answers of a prediction."""
        self._replace(trainer, "predictions.jsonl", self.take(trainer))

    def _replace(self, trainer: Trainer, filename: str, rows: list[dict]) -> None:
        path = self._path(trainer, filename)
        if path is not None and trainer.is_global_zero:
            replace_text(path, "")
            append_lines(path, rows)
            if trainer.state.fn != TrainerFn.VALIDATING:  # what a fit that follows takes over
                rank_zero_info(f"answers: {path}")

    def _path(self, trainer: Trainer, filename: str) -> Path | None:
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        return None if folder is None or trainer.fast_dev_run else Path(folder) / filename


def _at(row: dict, stage: int, after: str | None) -> dict:
    return {"row_id": row["row_id"], "task": row["task"], "stage": stage, "after": after, **row}
