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
    Answers of the checkpoint that it goes on from, by a ``validate`` before ``fit``, stand with those of its stage:
    where a stream was extended, they are about what is new.

    Args:
        filename: Of the file that ``fit`` writes.
    """

    def __init__(self, filename: str = "samples.jsonl") -> None:
        super().__init__()
        self.filename = filename
        self._validated: tuple[str | None, list[dict]] = None, []  # before `fit`: the checkpoint, and its answers

    on_test_batch_end = Answers.on_validation_batch_end
    on_predict_batch_end = Answers.on_validation_batch_end

    # -- writing ---------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside of ``fit``: holds the answers back, as a fit to come may begin with the model that gave them."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            rows = self.take(trainer)
            self._validated = _name_of(trainer.ckpt_path), rows
            self._replace(trainer, BASE_FILENAME, rows)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on after the stages that the run has behind it."""
        path = self._path(trainer, self.filename)
        if path is not None and trainer.is_global_zero:
            if trainer.ckpt_path is None:
                replace_text(path, "")
            else:
                self._resume(path, Path(trainer.ckpt_path).with_name(self.filename), trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task begins: takes over what its model answered before ``fit``."""
        (checkpoint, rows), self._validated = self._validated, (None, [])
        path, stage = self._path(trainer, self.filename), trainer.current_epoch
        if path is None or not rows or checkpoint != _name_of(trainer.ckpt_path) or not trainer.is_global_zero:
            return
        asked = {row["task"] for row in rows}
        keep_lines(path, lambda row: row["stage"] != stage or row["task"] not in asked)
        after = trainer.datamodule.stage_names[stage - 1] if stage else None
        append_lines(path, [_at(row, stage, after) for row in rows])
        path.with_name(BASE_FILENAME).unlink(missing_ok=True)

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        """A task that is resumed half-way has a model that no row stands for."""
        self._validated = None, []

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


def _name_of(checkpoint: str | Path | None) -> str | None:
    return None if checkpoint is None else str(checkpoint)


def _at(row: dict, stage: int, after: str | None) -> dict:
    return {"row_id": row["row_id"], "task": row["task"], "stage": stage, "after": after, **row}
