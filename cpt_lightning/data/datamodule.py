"""The stream of tasks as a LightningDataModule: an epoch is a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import lightning as L
from torch import Generator
from torch.utils.data import DataLoader

from cpt_lightning.checkpoint_io import is_within_task
from cpt_lightning.data.checks import (
    TRAINER_OPTIONS,
    check_choices,
    check_numbers,
    check_processor,
    check_stages,
    check_tasks,
    check_trainer,
)
from cpt_lightning.data.collate import Collate, Processor
from cpt_lightning.data.loader import KeptRows, StageLoader, StreamBatches, check_same_stage
from cpt_lightning.data.replay import Replay, ReplaySampler
from cpt_lightning.data.sampler import EvaluationSampler, Mixing, RowRef, Share, StageSampler, num_steps
from cpt_lightning.tasks import RolloutRows, Split, Task
from cpt_lightning.tasks.fingerprint import fingerprint
from cpt_lightning.tasks.prompts import Style
from cpt_lightning.types import Batch, Example


class TaskStream(L.LightningDataModule):
    """Tasks that are learned one after another, each for an epoch of the Trainer, and evaluated all together.

    A stage of the stream is one task, or several that are mixed; sequential, single-task and joint multi-task training
    differ in ``stages`` only. The Trainer needs the options of :attr:`trainer_options`, which ``cpt`` sets.

    Args:
        tasks: What is learned, by name.
        probes: What is never learned but always evaluated, by name; as are tasks that stand in no stage.
        stages: Task names in the order of learning; a list of names is a stage that mixes them. Every task in turn by
            default; ``[[a, b, c]]`` is joint training.
        prompts_per_step: Prompts of a training batch, over all ranks.
        passes: How often a stage goes through its rows (once by default), or that by stage name. May be a fraction; the
            last batch is filled up from the next pass. A mixed stage is called ``a+b``.
        steps: Batches of a stage instead of ``passes``, or that by stage name (``passes`` where it is not named).
        eval_prompts_per_step: Prompts of an evaluation batch, over all ranks.
        evaluate_on: Split for evaluation during ``fit``, ``validate`` and ``predict``: ``val`` to choose settings,
            ``test`` to report. ``cpt test`` always takes ``test``.
        predict_on: Rows that ``predict`` goes through: those of a split of every task and probe, or with ``train`` the
            training rows of the tasks of ``stages``. The split of ``evaluate_on`` by default.
        rollouts: File of completions that ``cpt predict`` collected: what the tasks of ``stages`` then learn, in place
            of their own training rows. Evaluation stays theirs.
        max_prompt_tokens: Training rows with a longer prompt are left out, counted and logged; nothing is cut.
            Evaluation asks every row, so that accuracies stay comparable.
        style: Asks every task and probe in this style, in place of its own (see ``Prompt.style``), and rewards keeping
            to it: ``think_boxed`` or ``think_answer`` with reasoning, ``direct`` without.
        target: Replaces the ``target`` of every task: what SFT learns.
        mixing: How often the tasks of a mixed stage are drawn: by ``size``, ``uniform``, or a temperature between
            (shares proportional to size to the power 1/temperature).
        replay: Rows of earlier tasks in the batches of later ones, such as ``{ratio: 0.1}``; none by default.
        num_workers: Processes that load rows; 0 loads them in the training process.
        seed: Draws the order of rows.

    Raises:
        TypeError: Something else than tasks by name.
        ValueError: No task, a name that cannot be one, is unknown or doubled, or a count out of range.
    """

    def __init__(
        self,
        tasks: dict[str, Task],
        probes: dict[str, Task] | None = None,
        stages: list[str | list[str]] | None = None,
        prompts_per_step: int = 16,
        passes: float | dict[str, float] | None = None,
        steps: int | dict[str, int] | None = None,
        eval_prompts_per_step: int = 64,
        evaluate_on: Literal["val", "test"] = "test",
        predict_on: Split | None = None,
        rollouts: str | None = None,
        max_prompt_tokens: int | None = None,
        style: Style | None = None,
        target: str | None = None,
        mixing: Mixing = "size",
        replay: Replay | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        probes = probes or {}
        check_tasks(tasks, probes)
        self.everything = {name: _as_asked(task, style, target) for name, task in {**tasks, **probes}.items()}
        if rollouts is not None:
            if target is not None:
                raise ValueError(
                    f"data.rollouts={rollouts!r} and data.target={target!r} both say what SFT learns; leave one out"
                )
            self.everything |= {name: _on_rollouts(self.everything[name], name, rollouts) for name in tasks}
        self.stages = [[stage] if isinstance(stage, str) else list(stage) for stage in (stages or tasks)]
        check_stages(self.stages, list(tasks), given=stages)
        self.prompts_per_step = prompts_per_step
        self.passes = passes
        self.steps = steps
        self.eval_prompts_per_step = eval_prompts_per_step
        self.evaluate_on: Split = evaluate_on
        self.predict_on: Split = evaluate_on if predict_on is None else predict_on
        self.max_prompt_tokens = max_prompt_tokens
        self.mixing = mixing
        self.replay = replay
        self.num_workers = num_workers
        self.seed = seed
        check_numbers(self)
        check_choices(self)
        self.choose_rows: Callable[[int], Mapping[str, Sequence[int]] | None] | None = None
        """Says which training rows of a stage are kept, by task (``None`` for all); asked when the stage begins."""
        self._asked: Sequence[str] | None = None
        self._processor: Processor | None = None
        self._examples: dict[tuple[str, Split], Sequence[Example]] = {}
        self._fingerprints: dict[tuple[str, Split], str] = {}

    # -- what the stream consists of -------------------------------------------------------------------------------

    @property
    def num_stages(self) -> int:
        """Stages of the stream, each an epoch of the Trainer."""
        return len(self.stages)

    @property
    def stage_names(self) -> list[str]:
        """Name of each stage: its task's, or ``a+b`` for a mixed one."""
        return ["+".join(stage) for stage in self.stages]

    @property
    def trainer_options(self) -> dict[str, Any]:
        """What this stream wants of its Trainer: ``Trainer(**stream.trainer_options, callbacks=...)``."""
        return {**TRAINER_OPTIONS, "max_epochs": self.num_stages}

    @cached_property
    def task_names(self) -> list[str]:
        """Tasks in the order in which they are learned first."""
        return list(dict.fromkeys(task for stage in self.stages for task in stage))

    @cached_property
    def probe_names(self) -> list[str]:
        """What is evaluated but never learned."""
        return [name for name in self.everything if name not in self.task_names]

    @property
    def asked(self) -> list[str]:
        """What an evaluation asks: every task, then every probe, unless some alone are :meth:`asking`."""
        names = [*self.task_names, *self.probe_names]
        return names if self._asked is None else [name for name in names if name in self._asked]

    @contextmanager
    def asking(self, names: Sequence[str]) -> Iterator[None]:
        """Evaluations are of these tasks and probes alone, for as long as it lasts."""
        self._asked = names
        try:
            yield
        finally:
            self._asked = None

    def examples(self, name: str, split: Split) -> Sequence[Example]:
        """The rows of a task or probe, made when they are fetched."""
        if (name, split) not in self._examples:
            self._examples[name, split] = self.everything[name].examples(split, name)
        return self._examples[name, split]

    def fingerprint(self, name: str, split: Split) -> str:
        """Equal where scores on a task or probe compare: where the same was asked and graded alike.

        See :func:`cpt_lightning.tasks.fingerprint.fingerprint`.
        """
        if (name, split) not in self._fingerprints:
            self._fingerprints[name, split] = fingerprint(self.everything[name], split, name)
        return self._fingerprints[name, split]

    def num_steps(self, stage: int, num_rows: int | None = None) -> int:
        """Batches of a stage that shows so many rows, all by default; fewer change nothing where ``steps`` says."""
        name = self.stage_names[stage]
        steps = self.steps.get(name) if isinstance(self.steps, Mapping) else self.steps
        if steps is not None:
            return steps
        passes = self.passes.get(name) if isinstance(self.passes, Mapping) else self.passes
        num_rows = num_rows or sum(self._sizes(self.stages[stage], "train").values())
        return num_steps(num_rows, self.own_rows_per_step(stage), 1.0 if passes is None else passes)

    def own_rows_per_step(self, stage: int) -> float:
        """Rows of a batch that are the stage's own and not replayed, on average."""
        old = self.replay.ratio if self.replay and self.earlier(stage) else 0.0
        return self.prompts_per_step * (1 - old)

    def earlier(self, stage: int) -> list[str]:
        """Tasks that were learned before a stage and are not learned in it."""
        before = dict.fromkeys(task for earlier in self.stages[:stage] for task in earlier)
        return [task for task in before if task not in self.stages[stage]]

    # -- what Lightning asks for -----------------------------------------------------------------------------------

    @property
    def processor(self) -> Processor:
        """Encodes prompts: the module's, unless another was set (as a notebook does), which ``None`` takes back."""
        if self._processor is not None:
            return self._processor
        if self.trainer is None:
            raise RuntimeError("without a Trainer the stream has no processor: set stream.processor = ... first")
        return self.trainer.lightning_module.processor

    @processor.setter
    def processor(self, processor: Processor | None) -> None:
        self._processor = processor

    def setup(self, stage: str) -> None:
        """Opens the sources that ``fit``, ``validate``, ``test`` or ``predict`` needs; empty ones are refused here."""
        check_processor(self)
        if stage == "fit":
            check_trainer(self)
            for name in self.task_names:
                self.examples(name, "train")
        split = {"test": "test", "predict": self.predict_on}.get(stage, self.evaluate_on)
        for name in self._evaluated(split):
            self.examples(name, split)

    def train_dataloader(self) -> StageLoader:
        """The training batches of the current epoch's stage; the loader's state is its step."""
        # Asked for before on_train_epoch_start, and after a resume with the finished epoch first: derive, keep nothing.
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        stage = min(epoch, self.num_stages - 1)
        collate = Collate(self.processor, self.max_prompt_tokens)
        batches = StreamBatches(self._learned_rows(stage), collate)
        return StageLoader(batches, self._stage_sampler(stage), self.num_workers, self._feeds_gpu)

    def rows_to_judge(self, stage: int, first: Mapping[str, int]) -> DataLoader:
        """Every training row of a stage once and in order, from row ``first`` of each task on, as in an evaluation."""
        return self._evaluation_loader("train", self.stages[stage], first)

    def rows_of_stage(self, stage: int, num_rows: int) -> Batch:
        """Rows of a stage as one batch, the same on every rank: what methods look at when it has been learned."""
        rows = self._learned_rows(stage)
        sizes = {name: len(rows[name]) for name in self.stages[stage]}
        sampler = StageSampler(sizes, num_rows, 1, (self.seed, stage), self.mixing)
        batches = StreamBatches(rows, Collate(self.processor, self.max_prompt_tokens))
        return batches[sampler.batch(0)]

    def rows_of_evaluation(self, name: str, num_rows: int) -> Batch:
        """Rows of a task or probe that is evaluated, evenly spaced, as one batch; the same on every rank."""
        rows = self._split(self.evaluate_on, [name])
        total = len(rows[name])
        count = min(num_rows, total)
        refs = [RowRef(name, number * total // count) for number in range(count)]
        return StreamBatches(rows, Collate(self.processor, with_targets=False))[refs]

    def val_dataloader(self) -> DataLoader:
        """All tasks and probes, one task per batch."""
        return self._evaluation_loader(self.evaluate_on, self._evaluated(self.evaluate_on))

    def test_dataloader(self) -> DataLoader:
        """All tasks and probes on their test split."""
        return self._evaluation_loader("test", self._evaluated("test"))

    def predict_dataloader(self) -> DataLoader:
        """The rows of ``predict_on``, in order, one task per batch."""
        return self._evaluation_loader(self.predict_on, self._evaluated(self.predict_on))

    def check_resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Looks at the place at which a checkpoint stands; how many rows are learned from, a filter may settle later.

        Raises:
            ValueError: It is in the middle of a stage that was of other batches.
        """
        if not is_within_task(checkpoint):
            return
        (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        sampler = self._stage_sampler(checkpoint["epoch"])
        num_steps = len(sampler) if state["sizes"] == sampler.sizes else state["num_steps"]
        check_same_stage(state, {**sampler.identity, "sizes": state["sizes"]}, num_steps)

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def _share(self) -> Share:
        return Share() if self.trainer is None else Share(self.trainer.global_rank, self.trainer.world_size)

    def _learned_rows(self, stage: int) -> dict[str, Sequence[Example]]:
        """Training rows of a stage and of the tasks before it: those that were kept when a task was learned last."""
        rows = self._split("train", [*self.stages[stage], *self.earlier(stage)])
        if self.choose_rows is None:
            return rows
        for name, every in rows.items():
            learned = max(index for index in range(stage + 1) if name in self.stages[index])
            if (kept := self.choose_rows(learned)) is not None:
                rows[name] = KeptRows(every, kept[name])
        return rows

    def _stage_sampler(self, stage: int) -> StageSampler:
        num_rows = {name: len(rows) for name, rows in self._learned_rows(stage).items()}
        sizes = {name: num_rows[name] for name in self.stages[stage]}
        options: dict[str, Any] = {
            "sizes": sizes,
            "batch_size": self.prompts_per_step,
            "num_steps": self.num_steps(stage, sum(sizes.values())),
            "key": (self.seed, stage),
            "mixing": self.mixing,
            "share": self._share,
        }
        earlier = self.earlier(stage)
        if self.replay is None or self.replay.ratio == 0 or not earlier:
            return StageSampler(**options)
        numbers = {task: number for number, task in enumerate(self.task_names)}
        return ReplaySampler(self.replay, {name: num_rows[name] for name in earlier}, numbers, **options)

    def _split(self, split: Split, names: Sequence[str]) -> dict[str, Sequence[Example]]:
        return {name: self.examples(name, split) for name in names}

    def _sizes(self, names: Sequence[str], split: Split) -> dict[str, int]:
        return {name: len(rows) for name, rows in self._split(split, names).items()}

    def _evaluation_loader(
        self, split: Split, names: Sequence[str], first: Mapping[str, int] | None = None
    ) -> DataLoader:
        sampler = EvaluationSampler(self._sizes(names, split), self.eval_prompts_per_step, self._share, first)
        # Rollouts of training rows are written down with their images.
        collate = Collate(self.processor, with_targets=False, keep_images=split == "train")
        batches = StreamBatches(self._split(split, names), collate, keep_places=True)
        generator = Generator()  # of its own, as StageLoader says
        return DataLoader(
            batches, sampler=sampler, batch_size=None, num_workers=self.num_workers, generator=generator,
            pin_memory=self._feeds_gpu,
        )  # fmt: skip

    @property
    def _feeds_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _evaluated(self, split: str) -> list[str]:
        """Whose rows of a split are asked: probes are never learned, and need not have training rows."""
        return self.task_names if split == "train" else self.asked


def _as_asked(task: Task, style: Style | None, target: str | None) -> Task:
    """The task, with what a stream says in the place of its own."""
    styled = task if style is None else task.in_style(style)
    return styled if target is None else replace(styled, target=target)


def _on_rollouts(task: Task, name: str, file: str) -> Task:
    """The task, with a file of rollouts for its training rows; the file has the rows that were drawn for it."""
    try:
        return replace(task, source=RolloutRows(file, name, task.source), target=None, num_train=None)
    except ValueError as error:
        raise ValueError(f"data.rollouts: {error}") from error
