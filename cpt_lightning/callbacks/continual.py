"""What crosses tasks: the record of what is learned and forgotten, and a fresh optimizer for every task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cpt_lightning.callbacks.checks import ChecksFit, check_evaluated_at_ends
from cpt_lightning.callbacks.continuation import answers_of, check_answers, check_stream, new_to
from cpt_lightning.checkpoint_io import RECORD, next_step, record_of
from cpt_lightning.records.matrix import AccuracyMatrix, Scores, logged_cell
from cpt_lightning.records.run import MATRIX


class ContinualLearning(ChecksFit):
    """Records the accuracy matrix, logs and prints what was learned and forgotten, and lets every task start afresh.

    An epoch is a task: the validation at its end, over all tasks and probes, is a row of the matrix. The first row is
    the untrained base; it comes from a ``trainer.validate`` before ``trainer.fit``, which ``cpt fit`` runs. Without one
    there is no such row and no metric that needs it. After every task ``accuracy_matrix.json`` in the log directory is
    written anew; the record is also part of the checkpoint, so that a resumed run goes on with it and measures nothing
    twice. The record also keeps each task's and probe's fingerprint; a checkpoint whose scores were measured with other
    questions, references or rewards, or on answers drawn otherwise, is refused.

    The stream may have grown since the checkpoint: by stages behind those that it had, and by probes. Rows that were
    there before have no scores of what is new, and :class:`~cpt_lightning.records.AccuracyMatrix` leaves it out where
    it would need them. But the row of the checkpoint's own model gets them, for forward transfer, from a
    ``trainer.validate`` of that checkpoint before ``trainer.fit``, which ``cpt fit`` runs (``stream.asking`` makes it
    one of what is new alone). Within a stage there is no need: the evaluation at its end asks everything.

    Logs ``continual/average_accuracy``, ``continual/forgetting_measure``, ``continual/backward_transfer``,
    ``continual/forward_transfer``, ``continual/learning``, ``continual/mean_average_accuracy`` and
    ``continual/worst_dip``; for every earlier task ``continual/forgetting/<task>``, its term of the forgetting measure;
    for every probe ``continual/probe/<name>`` (change since the base) and ``continual/probe_minimum/<name>`` (lowest
    change on the way), and as mean of the former ``continual/probes_mean_change``.

    Args:
        reset_optimizer: Begin every task with a fresh optimizer and learning-rate schedule. Otherwise both go on from
            task to task, over a resume as the checkpoint has them, even if the stream has become longer.
        confidence: Level of the confidence intervals (Wilson) printed beside accuracies, such as 0.95; none by default.
        print_table: Print the matrix after every task.

    Raises:
        ValueError: A level outside (0, 1).
    """

    def __init__(self, reset_optimizer: bool = True, confidence: float | None = None, print_table: bool = True) -> None:
        if confidence is not None and not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence} must lie between 0 and 1, e.g. 0.95; null shows no intervals")
        self.reset_optimizer = reset_optimizer
        self.confidence = confidence
        self.print_table = print_table
        self.zero_shot: Scores | None = None
        self.rows: list[Scores] = []
        self.fingerprints: dict[str, str] = {}
        self.answers: dict[str, Any] = {}
        self._stream: dict[str, Any] = {}
        self._is_resumed = False
        self._resumed_step = 0
        self._last_validation: Scores | None = None
        self._validated: tuple[str, Scores] | None = None  # a checkpoint, before `fit`

    def matrix(self, trainer: Trainer) -> AccuracyMatrix:
        """The record so far."""
        stream = trainer.datamodule
        return AccuracyMatrix(
            stream.task_names, stream.probe_names, stream.stages, self.zero_shot, self.rows, self.fingerprints
        )

    # -- recording -------------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores of a checkpoint stand at its step, as those of the untrained base at 0."""
        if trainer.state.fn == TrainerFn.VALIDATING and trainer.ckpt_path is not None:
            # Lightning's name for the place of what is logged.
            self.log("step", float(self._resumed_step), sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the scores of all tasks and probes; before ``fit`` they are the untrained base's."""
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        scores = self._logged_scores(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._last_validation = scores
            return
        if trainer.ckpt_path is not None:
            self._validated = str(trainer.ckpt_path), scores
        elif trainer.global_step == 0:  # else it is what this Trainer has learned, and no base
            self.zero_shot = scores
            self._print(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that a record is this run's, and complete where it is resumed, and writes it."""
        if trainer.fast_dev_run:
            return
        if self.rows and trainer.ckpt_path is None and trainer.global_step == 0:
            raise ValueError(
                "ContinualLearning holds the record of another run; give every Trainer callbacks of its own, also "
                "those that keep checkpoints, weights or measurements"
            )
        matrix = self.matrix(trainer)
        if self._is_resumed and len(self.rows) < trainer.current_epoch:
            raise ValueError(
                f"the checkpoint was written between the last batch of stage {trainer.current_epoch} and its "
                "evaluation, whose row is missing; resume from last.ckpt or from a task's checkpoint"
            )
        if self.zero_shot is None:
            rank_zero_warn(
                "ContinualLearning: the untrained base was not evaluated, so zero-shot row, forward transfer and probe "
                "changes will be missing; call trainer.validate(module, stream) before trainer.fit(...)"
            )
        self._save(trainer, matrix)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task begins: with a fresh optimizer, unless told otherwise."""
        if self.rows and not trainer.fast_dev_run:
            self._complete_row(trainer)
        # The module's own hook runs after this one, so that it sees the new schedule. The first task has a fresh one
        # anyway, and a task resumed half-way does not come here: it keeps the optimizer of its checkpoint.
        if self.reset_optimizer and trainer.current_epoch > 0:
            trainer.strategy.setup_optimizers(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        """What was validated before is not the task's end."""
        self._last_validation = self._validated = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A task is done: its row joins the matrix, before the checkpoint of the task is saved."""
        if trainer.fast_dev_run:
            return
        if self._last_validation is None:
            raise RuntimeError("a task ended without validation; set trainer.val_check_interval=1.0")
        self.rows = [*self.rows[: trainer.current_epoch], self._last_validation]
        matrix = self.matrix(trainer)
        self.log_dict({f"continual/{name}": value for name, value in matrix.metrics().items()}, sync_dist=True)
        self._save(trainer, matrix)
        self._print(trainer)

    def _complete_row(self, trainer: Trainer) -> None:
        """Adds to the row of the model that the next task begins with what was asked of it before ``fit``."""
        path, scores = self._validated or ("", {})
        row = {**self.rows[-1], **(scores if path == str(trainer.ckpt_path) else {})}
        matrix = self.matrix(trainer)
        if missing := [name for name in matrix.names if name not in row]:
            rank_zero_warn(
                f"ContinualLearning: {', '.join(missing)} came to the stream later, and the checkpoint was not asked; "
                "the matrix has no score before the next task's. Call trainer.validate(module, stream, ckpt_path=...) "
                "before trainer.fit(...) with the same ckpt_path"
            )
        if row != self.rows[-1]:
            self.rows = [*self.rows[:-1], {name: row[name] for name in matrix.names if name in row}]
            self._save(trainer, self.matrix(trainer))
            self._print(trainer)

    def _logged_scores(self, trainer: Trainer) -> Scores:
        stream, logged = trainer.datamodule, trainer.callback_metrics
        if missing := [name for name in stream.asked if f"val/{name}/accuracy" not in logged]:
            raise RuntimeError(
                f"val/{missing[0]}/accuracy was not logged: every task and probe must be evaluated. To evaluate less, "
                f"set num_{stream.evaluate_on} of the tasks rather than trainer.limit_val_batches"
            )
        return {name: logged_cell(f"val/{name}", logged) for name in stream.asked}

    def _save(self, trainer: Trainer, matrix: AccuracyMatrix) -> None:
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        if trainer.is_global_zero and folder is not None:
            matrix.save(Path(folder) / MATRIX)

    def _print(self, trainer: Trainer) -> None:
        if self.print_table and trainer.is_global_zero:
            self.matrix(trainer).print(self.confidence)

    # -- in the checkpoint -----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Where its record stands in a checkpoint, of a subclass too."""
        return RECORD

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remembers whose record it is, and refuses settings that would leave holes in it."""
        stream = trainer.datamodule
        if stream is None:
            raise ValueError("ContinualLearning needs a stream of tasks: call trainer.fit(module, datamodule=stream)")
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.fingerprints = {name: stream.fingerprint(name, stream.evaluate_on) for name in stream.asked}
            self.answers = answers_of(pl_module)
        self._stream = {"tasks": stream.task_names, "probes": stream.probe_names, "stages": stream.stages}

    def state_dict(self) -> dict:
        """The record, as plain lists and numbers."""
        record = {
            "zero_shot": self.zero_shot, "rows": self.rows, "fingerprints": self.fingerprints, "answers": self.answers,
        }  # fmt: skip
        return {**self._stream, **record}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks that a record that ``fit`` goes on with belongs to this stream, and says what is new, or left."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        record = record_of(checkpoint)
        self._resumed_step = next_step(checkpoint)
        if record is None or trainer.state.fn != TrainerFn.FITTING or trainer.fast_dev_run:
            return
        new = new_to(trainer, record)
        if len(record["rows"]) == trainer.datamodule.num_stages:
            rank_zero_info(
                "all stages of the stream were learned before this checkpoint; nothing is left to learn"
                + (f"; not asked: {new} (`cpt test --ckpt_path` asks everything)" if new else "")
            )
        elif new:
            rank_zero_info(
                f"the stream was extended since the checkpoint, by {new}. Forgetting and worst dip count what was lost "
                "since then, of what is new"
            )

    def check_resume(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any], path: str | Path
    ) -> None:
        """Refuses one whose record is of another stream, or was measured otherwise."""
        super().check_resume(trainer, pl_module, checkpoint, path)
        if (record := record_of(checkpoint)) is not None:
            check_stream(trainer, record)
            check_answers(pl_module, record)

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on with the record of a checkpoint."""
        self.zero_shot = state_dict["zero_shot"]
        self.rows = list(state_dict["rows"])
        self._is_resumed = True

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses to evaluate something else than everything after every task.

        Raises:
            ValueError: Names the option of the Trainer.
        """
        if trainer.fast_dev_run:
            return
        wanted = {"barebones": False, "check_val_every_n_epoch": 1, "limit_val_batches": 1.0}
        for option, value in wanted.items():
            given = getattr(trainer, option)
            if given != value or (isinstance(given, int) and isinstance(value, float)):  # 1 batch is not all of them
                raise ValueError(
                    f"trainer.{option}={given}: the validation after a task, over all rows of everything, is a row of "
                    f"the accuracy matrix; leave it at {value}. To evaluate less, set num_"
                    f"{trainer.datamodule.evaluate_on} of the tasks"
                )
        check_evaluated_at_ends(trainer)
