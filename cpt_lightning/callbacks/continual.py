"""What crosses tasks: the record of what is learned and forgotten, and a fresh optimizer for every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cpt_lightning.records.matrix import AccuracyMatrix, Scores, logged_cell
from cpt_lightning.records.run import MATRIX


class ContinualLearning(Callback):
    """Records the accuracy matrix, logs and prints what was learned and forgotten, and lets every task start afresh.

    An epoch is a task: the validation at its end, over all tasks and probes, is a row of the matrix. The first row is
    the untrained base; it comes from a ``trainer.validate`` before ``trainer.fit``, which ``cpt fit`` runs. Without one
    there is no such row and no metric that needs it. After every task ``accuracy_matrix.json`` in the log directory is
    written anew; the record is also part of the checkpoint, so that a resumed run goes on with it and measures nothing
    twice. The record also keeps each task's and probe's fingerprint; a checkpoint whose scores were measured with other
    questions, references or rewards, or on answers drawn otherwise, is refused.

    Logs ``continual/average_accuracy``, ``continual/forgetting_measure``, ``continual/backward_transfer``,
    ``continual/forward_transfer``, ``continual/learning``, ``continual/mean_average_accuracy`` and
    ``continual/worst_dip``; for every earlier task ``continual/forgetting/<task>``, its term of the forgetting measure;
    for every probe ``continual/probe/<name>`` (change since the base) and ``continual/probe_minimum/<name>`` (lowest
    change on the way), and as mean of the former ``continual/probes_mean_change``.

    Args:
        reset_optimizer: Begin every task with a fresh optimizer and learning-rate schedule.
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
        self._resumed: dict | None = None
        self._last_validation: Scores | None = None

    def matrix(self, trainer: Trainer) -> AccuracyMatrix:
        """The record so far."""
        stream = trainer.datamodule
        return AccuracyMatrix(
            stream.task_names, stream.probe_names, stream.stages, self.zero_shot, self.rows, self.fingerprints
        )

    # -- recording -------------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the scores of all tasks and probes; before ``fit`` they are the untrained base's."""
        if trainer.sanity_checking or trainer.fast_dev_run:
            return
        scores = self._logged_scores(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self._last_validation = scores
            return
        if trainer.ckpt_path is None:  # else `validate` was asked about a checkpoint
            self.zero_shot = scores
            self._print(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that a resumed record belongs to this stream, and says so if all of it has been learned."""
        if self._resumed is None or trainer.fast_dev_run:
            return
        matrix = self.matrix(trainer)
        for part in ("tasks", "probes", "stages"):
            before, now = self._resumed[part], getattr(matrix, part)
            if before != now:
                raise ValueError(
                    f"the checkpoint belongs to another stream: its {part} are {before}, now they are {now}. To learn "
                    "more tasks after these, begin a new run from the model: `cpt export` it, and name the folder as "
                    "backbone.path"
                )
        self._check_fingerprints(self._resumed.get("fingerprints", {}))
        self._check_answers(self._resumed.get("answers", {}))
        if len(self.rows) == len(matrix.stages):
            rank_zero_info("all stages of the stream were learned before this checkpoint; nothing is left to learn")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that a resumed record is complete, and writes it."""
        if trainer.fast_dev_run:
            return
        matrix = self.matrix(trainer)
        if self._resumed is not None and len(self.rows) < trainer.current_epoch:
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
        # The module's own hook runs after this one, so that it sees the new schedule. The first task has a fresh one
        # anyway, and a task resumed half-way does not come here: it keeps the optimizer of its checkpoint.
        if self.reset_optimizer and trainer.current_epoch > 0:
            trainer.strategy.setup_optimizers(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        """What was validated before is not the task's end."""
        self._last_validation = None

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

    def _logged_scores(self, trainer: Trainer) -> Scores:
        stream, logged = trainer.datamodule, trainer.callback_metrics
        names = [*stream.task_names, *stream.probe_names]
        if missing := [name for name in names if f"val/{name}/accuracy" not in logged]:
            raise RuntimeError(
                f"val/{missing[0]}/accuracy was not logged: every task and probe must be evaluated. To evaluate less, "
                f"set num_{stream.evaluate_on} of the tasks rather than trainer.limit_val_batches"
            )
        return {name: logged_cell(f"val/{name}", logged) for name in names}

    def _save(self, trainer: Trainer, matrix: AccuracyMatrix) -> None:
        folder = trainer.log_dir  # a broadcast: all ranks must ask
        if trainer.is_global_zero and folder is not None:
            matrix.save(Path(folder) / MATRIX)

    def _print(self, trainer: Trainer) -> None:
        if self.print_table and trainer.is_global_zero:
            self.matrix(trainer).print(self.confidence)

    # -- in the checkpoint -----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remembers whose record it is, and refuses settings that would leave holes in it."""
        stream = trainer.datamodule
        if stream is None:
            raise ValueError("ContinualLearning needs a stream of tasks: call trainer.fit(module, datamodule=stream)")
        if stage == "fit":
            self._check_evaluation(trainer)
            names = [*stream.task_names, *stream.probe_names]
            self.fingerprints = {name: stream.fingerprint(name, stream.evaluate_on) for name in names}
            if (sampling := getattr(pl_module, "evaluation", None)) is not None:
                self.answers = {**asdict(sampling), "forced_prefix": getattr(pl_module, "forced_prefix", None)}
        self._stream = {"tasks": stream.task_names, "probes": stream.probe_names, "stages": stream.stages}

    def state_dict(self) -> dict:
        """The record, as plain lists and numbers."""
        record = {
            "zero_shot": self.zero_shot, "rows": self.rows, "fingerprints": self.fingerprints, "answers": self.answers,
        }  # fmt: skip
        return {**self._stream, **record}

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on with the record of a checkpoint."""
        self.zero_shot = state_dict["zero_shot"]
        self.rows = list(state_dict["rows"])
        self._resumed = state_dict

    def _check_fingerprints(self, before: Mapping[str, str]) -> None:
        """Refuses to go on with scores that were measured otherwise; earlier checkpoints do not say how."""
        for name, now in self.fingerprints.items():
            if before.get(name, now) != now:
                raise ValueError(
                    f"task '{name}' is evaluated otherwise than in the checkpoint (fingerprint {before[name]}, now "
                    f"{now}), and the matrix would mix two measurements: restore its prompt, reward, rows and "
                    "data.evaluate_on, or begin a new run"
                )

    def _check_answers(self, before: Mapping[str, Any]) -> None:
        """Refuses to go on where answers are drawn otherwise."""
        for name, now in self.answers.items():
            if before.get(name, now) != now:
                option = name if name == "forced_prefix" else f"evaluation.{name}"
                raise ValueError(
                    f"{option} is {now!r}, in the checkpoint it is {before[name]!r}, and the matrix would mix two "
                    "measurements: restore it, or begin a new run"
                )

    def _check_evaluation(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run and (trainer.check_val_every_n_epoch != 1 or trainer.limit_val_batches == 0):
            raise ValueError(
                "the validation after a task is a row of the accuracy matrix: "
                "trainer.check_val_every_n_epoch must be 1, and trainer.limit_val_batches not 0"
            )
