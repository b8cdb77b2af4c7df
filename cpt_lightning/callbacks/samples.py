"""What the model said at each evaluation, with verdicts, as JSON lines."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.records.files import append_lines, keep_lines, replace_text
from cpt_lightning.types import Evaluation, Example

BASE_FILENAME = "validate.jsonl"
"""What ``validate`` writes; a fit that follows takes it over as its zero-shot row."""


class SampleLog(Callback):
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
        self.filename = filename
        self._rows: list[tuple[tuple[int, int, int], dict]] = []
        self._base: list[dict] = []

    # -- collecting ------------------------------------------------------------------------------------------------

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Evaluation, batch, batch_idx: int, *_
    ) -> None:
        """Takes the answers of a batch."""
        if trainer.sanity_checking:
            return
        for position, example in enumerate(outputs.examples):
            if outputs.valid[position]:
                row = sample(example, outputs.texts[position], outputs.scores[position])
                # Every rank has a run of neighbouring rows of each batch, so this key is the order of a single rank.
                self._rows.append(((batch_idx, trainer.global_rank, position), row))

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def _take(self, trainer: Trainer) -> list[dict]:
        """The collected answers of all ranks, in the order of the evaluation."""
        rows = [row for rank in range(trainer.world_size) for row in trainer.strategy.broadcast(self._rows, src=rank)]
        self._rows = []
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]

    # -- writing ---------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an evaluation that was not finished or not needed."""
        self._rows = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside of ``fit``: holds the answers back, as they may be the untrained base's of a fit to come."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._base = self._take(trainer)
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
        rows = self._take(trainer)
        path = self._path(trainer, self.filename)
        if path is not None and trainer.is_global_zero:
            append_lines(path, [_at(row, stage + 1, name) for row in rows])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the answers of the test split."""
        self._replace(trainer, "test.jsonl", self._take(trainer))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the answers of a prediction."""
        self._replace(trainer, "predictions.jsonl", self._take(trainer))

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


def sample(example: Example, completion: str, scores: dict[str, float]) -> dict:
    """One answer with its verdict, as a line of the file."""
    return {
        "row_id": example.row_id,
        "task": example.task,
        "prompt": prompt_text(example.messages),
        "gold": example.gold,
        "completion": completion,
        "accuracy": scores["accuracy"],
        "parts": scores,
    }


def prompt_text(messages: list[dict]) -> str:
    """A chat prompt as one text; an image stands as ``<image>``.

    >>> prompt_text([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}])
    '<image>What is it?'
    """
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)
        turns.append(text if message["role"] == "user" else f"[{message['role']}] {text}")
    return "\n".join(turns)


def _at(row: dict, stage: int, after: str | None) -> dict:
    return {"row_id": row["row_id"], "task": row["task"], "stage": stage, "after": after, **row}
