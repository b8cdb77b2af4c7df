"""Rollout-based instance filtering: a task is learned from the rows that the model can solve sometimes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from cpt_lightning.callbacks.verdicts import Mode, VerdictFile, Window
from cpt_lightning.rollouts import Sampling
from cpt_lightning.types import Batch


class RolloutFilter(Callback):
    """Before each task, lets the current model try every training row, and keeps rows by how often it was right.

    This is the filter of RIF-RFT (arXiv 2507.05386); it works with every objective. A completion passes if its accuracy
    reaches ``threshold`` and it has the format that its reward asks for. The verdicts stand in
    ``filter/<task>.jsonl`` of the run directory and are written as rows are judged: a killed run judges no row twice,
    and a resumed one reads them. With ``data.passes`` fewer rows make fewer steps; with ``data.steps`` a stage makes
    the same steps on the rows that are kept.

    Logs at the end of a task ``filter/kept_fraction``, ``filter/time_s`` (what judging took) and ``filter/saved_s``:
    the steps left out times the mean duration of the task's steps.

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
        seed: Keys attempts and draws.

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
        seed: int = 0,
    ) -> None:
        if completions_per_row < 1:
            raise ValueError(f"filter.completions_per_row={completions_per_row} must be at least 1")
        self.highest = completions_per_row if highest is None else highest
        if not 0 <= lowest <= self.highest <= completions_per_row:
            raise ValueError(
                f"filter.lowest={lowest} and filter.highest={self.highest} must lie in 0 to "
                f"completions_per_row={completions_per_row}, in this order"
            )
        if not 0 < threshold <= 1:
            raise ValueError(f"filter.threshold={threshold} must lie in (0, 1]")
        for name, count in {"cap": cap, "min_rows": min_rows}.items():
            if count is not None and count < 1:
                raise ValueError(f"filter.{name}={count} must be at least 1")
        if filter_from is not None and mode is None:
            raise ValueError("filter_from has no effect without filter.mode; set it to solvable, unsolvable or random")
        self.mode = mode
        self.completions_per_row = completions_per_row
        self.lowest = lowest
        self.threshold = threshold
        self.sampling = sampling
        self.cap = cap
        self.min_rows = min_rows
        self.filter_from = filter_from
        self.seed = seed
        self._kept: dict[int, dict[str, list[int]]] = {}
        self._verdicts: list[dict] = []
        self._step_s: list[float] = []

    # -- hooks -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has the stream ask which rows of a stage to show; it does when model and checkpoint are in place."""
        if stage != "fit" or self.mode is None or trainer.fast_dev_run:
            return
        self._kept = {}
        trainer.datamodule.choose_rows = lambda index: self._choose(trainer, index)

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
        if stage not in self._kept:
            return
        left_out = stream.num_steps(stage) - stream.num_steps(stage, self._kept[stage])
        mean_s = sum(self._step_s) / max(1, len(self._step_s))
        shown = {
            "kept_fraction": sum(row["kept"] for row in self._verdicts) / len(self._verdicts),
            "time_s": sum(row["time_s"] for row in self._verdicts),
            "saved_s": left_out * mean_s,
        }
        self.log_dict({f"filter/{name}": value for name, value in shown.items()}, sync_dist=True)

    # -- choosing --------------------------------------------------------------------------------------------------

    def _choose(self, trainer: Trainer, stage: int) -> dict[str, list[int]] | None:
        """Rows of each task of a stage that are kept; ``None`` (all) of a stage that is learned already."""
        progress = trainer.fit_loop.epoch_progress.current
        if progress.processed > stage:
            return None
        if stage not in self._kept:
            self._kept[stage] = self._judge_stage(trainer, stage)
        return self._kept[stage]

    def _judge_stage(self, trainer: Trainer, stage: int) -> dict[str, list[int]]:
        stream, name = trainer.datamodule, self._name(trainer, stage)
        file = VerdictFile(Path(trainer.log_dir), name)
        header = self._header(trainer, stage)
        verdicts = self._earlier(trainer, stage, file, header)
        num_rows = sum(header["num_rows"].values())
        if len(verdicts) < num_rows:
            verdicts = verdicts + self._judge(trainer, stage, file, verdicts)
        assert self.mode is not None
        window = Window(self.mode, self.lowest, self.highest, self.cap, key=(self.seed, stage))
        self._verdicts = window.decide(verdicts)
        if trainer.is_global_zero:
            file.finish(header, self._verdicts)
        kept = {
            task: [row["row"] for row in self._verdicts if row["task"] == task and row["kept"]]
            for task in stream.stages[stage]
        }
        self._check(trainer, stage, kept)
        rank_zero_info(f"filter: {name}: {sum(map(len, kept.values()))} of {num_rows} rows are kept ({self.mode})")
        return kept

    def _earlier(self, trainer: Trainer, stage: int, file: VerdictFile, header: dict) -> list[dict]:
        """Verdicts that need not be paid for again; without any, the file begins."""
        source = file if self.filter_from is None else VerdictFile(Path(self.filter_from), file.path.stem)
        # Only the stage at which this fit begins was judged by the model it has: later files are another run's.
        fresh = self.filter_from is None and bool(self._kept)
        found = trainer.strategy.broadcast(source.read() if trainer.is_global_zero and not fresh else None)
        if self.filter_from is not None:
            return self._taken_over(source, found, header)
        within = trainer.fit_loop.epoch_progress.current.started > stage
        if found is None:
            if within:
                raise FileNotFoundError(f"{file.path} is missing, but the checkpoint stands in its stage: restore it")
            if trainer.is_global_zero:
                file.begin(header)
            return []
        for option, now in header.items():
            if found[0].get(option) != now and not (within and option == "global_step"):
                raise ValueError(
                    f"{source.path}: rows were judged with {option}={found[0].get(option)}, now it is {now}; "
                    "restore that, or delete the file to judge them again"
                )
        return found[1]

    def _taken_over(self, source: VerdictFile, found: tuple[dict, list[dict]] | None, header: dict) -> list[dict]:
        if found is None or len(found[1]) < sum(found[0]["num_rows"].values()):
            raise ValueError(f"filter_from: {source.path} is missing or unfinished; name the folder of a whole run")
        for option in ("rows", "num_rows", "completions_per_row", "threshold"):
            if found[0].get(option) != header[option]:
                raise ValueError(
                    f"filter_from: {source.path} has {option}={found[0].get(option)}, this run {header[option]}; "
                    "its verdicts are about other rows or attempts"
                )
        return found[1]

    def _header(self, trainer: Trainer, stage: int) -> dict:
        stream = trainer.datamodule
        return {
            "version": 1,
            "stage": stage,
            "rows": {task: stream.fingerprint(task, "train") for task in stream.stages[stage]},
            "num_rows": {task: len(stream.examples(task, "train")) for task in stream.stages[stage]},
            "completions_per_row": self.completions_per_row,
            "threshold": self.threshold,
            "sampling": asdict(self._sampling(trainer.lightning_module)),
            "seed": self.seed,
            "global_step": trainer.global_step,
        }

    def _check(self, trainer: Trainer, stage: int, kept: dict[str, list[int]]) -> None:
        fewest = self.min_rows or trainer.datamodule.prompts_per_step
        total = sum(map(len, kept.values()))
        empty = [task for task, rows in kept.items() if not rows]
        if total < fewest or empty:
            of = f"none of task '{empty[0]}'" if empty and total else f"{total} rows"
            raise ValueError(
                f"filter: of stage '{trainer.datamodule.stage_names[stage]}' {of} are kept, at least {fewest} are "
                "needed (filter.min_rows); its verdicts stand in filter/. Widen filter.lowest and filter.highest, "
                "raise completions_per_row, or leave the task out"
            )

    # -- judging ---------------------------------------------------------------------------------------------------

    def _judge(self, trainer: Trainer, stage: int, file: VerdictFile, done: Sequence[dict]) -> list[dict]:
        """Judges the rows behind those that are ``done``, all ranks together; rank 0 writes them, batch by batch."""
        stream = trainer.datamodule
        first = {task: sum(row["task"] == task for row in done) for task in stream.stages[stage]}
        loader = stream.rows_to_judge(stage, first)
        total = sum(len(stream.examples(task, "train")) for task in stream.stages[stage])
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        verdicts: list[dict] = []
        with tqdm(total=total, initial=len(done), unit="rows", disable=not shown, file=sys.stdout) as bar:
            bar.set_description(f"filtering {stream.stage_names[stage]}")
            start = time.perf_counter()
            for refs, batch in zip(loader.sampler, loader, strict=True):
                own = self._judge_batch(trainer, stage, refs, batch)
                rows = [row for rank in range(trainer.world_size) for row in trainer.strategy.broadcast(own, src=rank)]
                now = time.perf_counter()
                rows = [{**row, "time_s": (now - start) / len(rows)} for row in rows]
                rows, start = trainer.strategy.broadcast(rows), now
                if trainer.is_global_zero:
                    file.append(rows)
                verdicts += rows
                passed = [self.lowest <= row["pass_count"] <= self.highest for row in (*done, *verdicts)]
                bar.set_postfix(kept=f"{sum(passed) / len(passed):.0%}", refresh=False)
                bar.update(len(rows))
        return verdicts

    def _judge_batch(self, trainer: Trainer, stage: int, refs: Sequence, batch: Batch) -> list[dict]:
        """This rank's verdicts on the rows of a batch that count."""
        module, stream, prompts = trainer.lightning_module, trainer.datamodule, batch.prompts
        limit = stream.max_prompt_tokens
        assert prompts.valid is not None, "rows_to_judge says which rows count"
        refused = [
            "image refused" if ref.valid and not valid else f"longer than max_prompt_tokens={limit}" if long else None
            for ref, valid, long in zip(
                refs, prompts.valid.tolist(), [limit is not None and n > limit for n in prompts.lengths], strict=True
            )
        ]
        # A rank without a row to judge still samples, or those that gather weights would wait for it.
        asked = [i for i, ref in enumerate(refs) if ref.valid and refused[i] is None] or [0]
        tasks = stream.stages[stage]
        keys = [(self.seed, stage, tasks.index(refs[i].task), refs[i].row) for i in asked]
        moved = trainer.strategy.batch_to_device(prompts.select(asked))
        size = self.completions_per_row
        with trainer.precision_plugin.val_step_context():
            texts, scores = module.attempt(moved, size, self._sampling(module), keys)
        answers = {row: (texts[n * size :][:size], scores[n * size :][:size]) for n, row in enumerate(asked)}
        return [
            self._verdict(ref, prompts.examples[i].row_id, refused[i], *(([], []) if refused[i] else answers[i]))
            for i, ref in enumerate(refs)
            if ref.valid
        ]

    def _verdict(self, ref, row_id: str, refused: str | None, texts: list[str], scores: list[dict]) -> dict:
        passed = [each["accuracy"] >= self.threshold and each.get("format", 1.0) == 1.0 for each in scores]
        return {
            "row_id": row_id,
            "task": ref.task,
            "row": ref.row,
            "pass_count": sum(passed),
            "mean_reward": sum(each["total"] for each in scores) / max(1, len(scores)),
            "completion": texts[passed.index(True) if any(passed) else 0] if texts else None,
            "refused": refused,
        }

    def _sampling(self, module: LightningModule) -> Sampling:
        if self.sampling is not None:
            return self.sampling
        return replace(getattr(module, "sampling", module.evaluation), temperature=1.0)

    @staticmethod
    def _name(trainer: Trainer, stage: int) -> str:
        """The stage's name, numbered where the stream comes back to it."""
        names = trainer.datamodule.stage_names
        earlier = names[:stage].count(names[stage])
        return f"{names[stage]}_{earlier + 1}" if earlier else names[stage]
