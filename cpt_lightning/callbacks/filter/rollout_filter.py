"""Rollout-based instance filtering: a task is learned from the rows that the model can solve sometimes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.callbacks.checkpoints import TaskCheckpoint
from cpt_lightning.callbacks.checks import ChecksFit
from cpt_lightning.callbacks.display.meter import row_meter
from cpt_lightning.callbacks.filter.choice import Choice, Mode, kept_rows, shortage
from cpt_lightning.callbacks.filter.judge import Judge
from cpt_lightning.callbacks.filter.verdicts import Verdict, VerdictFile
from cpt_lightning.checkpoint_io import is_within_task
from cpt_lightning.models.fingerprint import model_fingerprint
from cpt_lightning.rollouts import Sampling
from cpt_lightning.tasks.checks import check_known
from cpt_lightning.types import Batch

Kept = dict[str, list[int]]
"""Numbers of the rows that are kept, by task."""


class RolloutFilter(ChecksFit):
    """Before each task, lets the current model try every training row, and keeps rows by how often it was right.

    This is the filter of RIF-RFT (arXiv 2507.05386); it works with every objective. A completion passes if its accuracy
    reaches ``threshold`` and it has the format that its reward asks for. The verdicts stand in
    ``filter/<task>.jsonl`` of the run directory and are written as rows are judged, ``data.eval_prompts_per_step`` at a
    time: a run that was killed goes on behind them. Which rows were kept is in the checkpoint too. With ``data.passes``
    fewer rows make fewer steps; with ``data.steps`` a task has the same steps, on the rows that are kept. Replay takes
    the kept rows of earlier tasks.

    Logs at the end of a task ``filter/kept_fraction``; ``filter/time_s``, what judging took (0 with verdicts of another
    run); and ``filter/saved_s``: the steps left out at the mean duration of the task's steps, less ``filter/time_s``.
    It is negative where judging took longer than the steps that it spared.

    Args:
        mode: ``solvable`` keeps rows in the window; ``unsolvable`` as many rows below it and ``random`` as many of any,
            for control. Off by default.
        completions_per_row: K, attempts at a row.
        lowest: Fewest passes of a solvable row.
        highest: Most passes of a solvable row; K by default. K - 1 also drops what is solved always.
        threshold: Accuracy from which an answer is right, for tasks with soft accuracies.
        sampling: How attempts are drawn; by default as the module samples (RFT), else as it evaluates (SFT), both at
            temperature 1.
        cap: Most rows of a stage that are kept, drawn at random.
        min_rows: Fewer kept rows stop the run; a training batch (``data.prompts_per_step``) by default.
        filter_from: Folder of another run whose verdicts are taken over.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        mode: Mode | None = None,
        completions_per_row: int = 8,
        lowest: int = 1,
        highest: int | None = None,
        threshold: float = 1.0,
        sampling: Sampling | None = None,
        cap: int | None = None,
        min_rows: int | None = None,
        filter_from: str | None = None,
    ) -> None:
        highest = completions_per_row if highest is None else highest
        for name, count in {"completions_per_row": completions_per_row, "cap": cap, "min_rows": min_rows}.items():
            if count is not None and count < 1:
                raise ValueError(f"filter.{name}={count} must be at least 1")
        if not 0 <= lowest <= highest <= completions_per_row:
            raise ValueError(
                f"filter.lowest={lowest} and filter.highest={highest} must lie in 0 to "
                f"completions_per_row={completions_per_row}, in this order"
            )
        if mode is not None:
            check_known("filter.", mode=(mode, Mode))
        if mode == "unsolvable" and lowest == 0:
            raise ValueError("filter.mode=unsolvable keeps rows with fewer passes than filter.lowest, which is 0")
        if not 0 < threshold <= 1:
            raise ValueError(f"filter.threshold={threshold} must lie in (0, 1]")
        if filter_from is not None and mode is None:
            raise ValueError("filter_from has no effect without filter.mode; set it to solvable, unsolvable or random")
        self.judge = Judge(completions_per_row, threshold, sampling)
        self.is_on = mode is not None
        self.choice = Choice(mode or "solvable", lowest, highest, cap)
        self.min_rows = min_rows
        self.filter_from = filter_from
        self._stages: dict[int, dict[str, Any]] = {}
        self._step_s: list[float] = []
        self._afterwards = ExitStack()

    # -- hooks -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has the stream ask which rows of a stage to show, when model and checkpoint are in place."""
        if stage != "fit" or not self.is_on or trainer.fast_dev_run:
            return
        self._stages = {}
        super().setup(trainer, pl_module, stage)
        stream = trainer.datamodule
        self._afterwards.callback(setattr, stream, "choose_rows", stream.choose_rows)
        stream.choose_rows = lambda index: self._kept_rows(trainer, index)

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads all verdicts of ``filter_from``: rather now than after the first tasks.

        Raises:
            ValueError: Some are missing, or about other rows or by another measure.
        """
        if self.is_on and self.filter_from is not None:
            for stage in range(trainer.datamodule.num_stages):
                self._taken_over(trainer, stage)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the stream as it was, for the next Trainer that it is given to."""
        self._afterwards.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same for a run that fails or is stopped, which Lightning does not tear down."""
        self._afterwards.close()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to measure steps."""
        self._step_s = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """A step begins."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        """A step has ended."""
        self._step_s.append(time.perf_counter() - self._start)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what was kept, what that cost and what it saved."""
        stage, stream = trainer.current_epoch, trainer.datamodule
        if stage not in self._stages:
            return
        record = self._stages[stage]
        num_kept = sum(map(len, record["kept"].values()))
        left_out = stream.num_steps(stage) - stream.num_steps(stage, num_kept)
        mean_s = sum(self._step_s) / max(1, len(self._step_s))
        shown = {
            "kept_fraction": num_kept / record["num_rows"],
            "time_s": record["time_s"],
            "saved_s": left_out * mean_s - record["time_s"],
        }
        self.log_dict({f"filter/{name}": value for name, value in shown.items()}, sync_dist=True)

    def state_dict(self) -> dict:
        """Which rows were kept of every stage so far, and by which options."""
        return {"stages": self._stages}

    def check_resume(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any], path: str | Path
    ) -> None:
        """Refuses other options within a stage whose rows were chosen; one that began with all rows ends with them."""
        super().check_resume(trainer, pl_module, checkpoint, path)
        stage, chosen = checkpoint["epoch"], checkpoint.get("callbacks", {}).get(self.state_key, {}).get("stages", {})
        if not is_within_task(checkpoint) or stage not in chosen:
            return
        for option, before in chosen[stage]["options"].items():
            if before != (now := self._options[option]):
                raise ValueError(
                    f"the checkpoint stands within stage '{trainer.datamodule.stage_names[stage]}', whose rows were "
                    f"chosen with filter.{option}={before}, now it is {now}; restore it, or resume from a checkpoint "
                    "at the end of a task"
                )

    def load_state_dict(self, state_dict: dict) -> None:
        """Goes on with the rows of a checkpoint."""
        self._stages = dict(state_dict["stages"])

    # -- choosing --------------------------------------------------------------------------------------------------

    def _kept_rows(self, trainer: Trainer, stage: int) -> Kept | None:
        """The rows of a stage that are kept; ``None``, all, of one that was begun without a filter."""
        progress = trainer.fit_loop.epoch_progress.current
        if stage not in self._stages:
            if progress.started > stage:
                return None
            self._stages[stage] = self._choose(trainer, stage)
        return self._stages[stage]["kept"]

    def _choose(self, trainer: Trainer, stage: int) -> dict[str, Any]:
        stream, file = trainer.datamodule, VerdictFile(Path(trainer.log_dir), stage_file(trainer, stage))
        header = self._header(trainer, stage)
        if self.filter_from is None:
            verdicts = self._judged(trainer, stage, file, header)
        else:
            verdicts = self._taken_over(trainer, stage)
            header["filter_from"] = self.filter_from
        verdicts = self.choice.of(verdicts, stream.seed, stage)
        if trainer.is_global_zero:
            file.finish({**header, **asdict(self.choice)}, verdicts)
        self._check_enough(trainer, stage, verdicts, file)
        kept = kept_rows(verdicts, stream.stages[stage])
        rank_zero_info(f"filter: {file.path}: {sum(map(len, kept.values()))} of {len(verdicts)} rows are kept")
        return {
            "kept": kept,
            "num_rows": len(verdicts),
            "time_s": 0.0 if self.filter_from else sum(each.time_s for each in verdicts),
            "options": self._options,
        }

    def _judged(self, trainer: Trainer, stage: int, file: VerdictFile, header: dict[str, Any]) -> list[Verdict]:
        """Verdicts on all rows; those that are not in the file yet are judged, all ranks together."""
        stream, name = trainer.datamodule, trainer.datamodule.stage_names[stage]
        verdicts = trainer.strategy.broadcast(file.begin(header) if trainer.is_global_zero else [])
        first = {task: sum(each.task == task for each in verdicts) for task in stream.stages[stage]}
        num_rows = sum(header["num_rows"].values())
        if len(verdicts) == num_rows:
            return verdicts
        num_solvable = sum(map(self.choice.holds, verdicts))
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, TaskCheckpoint):  # before the first stage nothing else has done so
            checkpoint.signals.watch(trainer)
        with row_meter(trainer, f"filtering {name}", num_rows, len(verdicts)) as meter:
            for judged in self.judge.verdicts(trainer, stage, stream.rows_to_judge(stage, first)):
                if trainer.is_global_zero:
                    file.append(judged)
                verdicts += judged
                num_solvable += sum(map(self.choice.holds, judged))
                solvable = f"{num_solvable / len(verdicts):.0%} solvable"
                meter.advance(len(judged), len(judged), solvable)
                if isinstance(checkpoint, TaskCheckpoint):
                    checkpoint.stop_if_asked(trainer)
        return verdicts

    def _taken_over(self, trainer: Trainer, stage: int) -> list[Verdict]:
        """The verdicts of another run, by whatever model, on the same rows by the same measure."""
        assert self.filter_from is not None
        expected = self._measure(trainer, stage)
        return VerdictFile(Path(self.filter_from), stage_file(trainer, stage)).taken_over(expected)

    # -- what verdicts depend on -----------------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, stage: int) -> dict[str, Any]:
        """What verdicts are about, and by which measure."""
        stream = trainer.datamodule
        return {
            "version": 1,
            "rows": {task: stream.fingerprint(task, "train") for task in stream.stages[stage]},
            "num_rows": {task: len(stream.examples(task, "train")) for task in stream.stages[stage]},
            "completions_per_row": self.judge.completions_per_row,
            "threshold": self.judge.threshold,
        }

    def _header(self, trainer: Trainer, stage: int) -> dict[str, Any]:
        """All that verdicts depend on."""
        module = trainer.lightning_module
        return {
            **self._measure(trainer, stage),
            "stage": stage,
            "max_prompt_tokens": trainer.datamodule.max_prompt_tokens,
            "sampling": asdict(self.judge.sampling_for(module)),
            "seed": module.seed,
            "model": model_fingerprint(module.model),
        }

    @property
    def _options(self) -> dict[str, Any]:
        return {**asdict(self.choice), **asdict(self.judge), "mode": self.choice.mode if self.is_on else None}

    # -- refusals --------------------------------------------------------------------------------------------------

    def _check_enough(self, trainer: Trainer, stage: int, verdicts: Sequence[Verdict], file: VerdictFile) -> None:
        stream = trainer.datamodule
        if missing := shortage(verdicts, stream.stages[stage], self.min_rows or stream.prompts_per_step):
            raise ValueError(
                f"filter: stage '{stream.stage_names[stage]}': {missing}. See {file.path}, then widen filter.lowest "
                "and filter.highest, raise filter.completions_per_row, lower filter.min_rows, or take the task out of "
                "data.stages"
            )


def stage_file(trainer: Trainer, stage: int) -> str:
    """The stage's name, numbered where the stream comes back to it."""
    names = trainer.datamodule.stage_names
    earlier = names[:stage].count(names[stage])
    return f"{names[stage]}_{earlier + 1}" if earlier else names[stage]
