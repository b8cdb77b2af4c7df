"""``cpt rehearse``: the largest steps of a run and an evaluation batch, where and as ``cpt fit`` would run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch.utilities import rank_zero_only

from cpt_lightning.cli.beforehand import BeforehandCLI, Sizes
from cpt_lightning.cli.errors import saying_complaints
from cpt_lightning.cli.inspect.tables import console
from cpt_lightning.cli.lightning_cli import RunTrainer
from cpt_lightning.cli.plan.tables import ADVICE, ADVICE_BY_PHASE, CALLBACK_ADVICE, SFT_ADVICE
from cpt_lightning.cli.rehearse.batches import LargestBatches
from cpt_lightning.cli.rehearse.duration import duration_of
from cpt_lightning.cli.rehearse.filter_trial import FilterTrial
from cpt_lightning.cli.rehearse.memory import DeviceMemory
from cpt_lightning.cli.rehearse.tables import duration_lines, part_table, room_line, what_is_rehearsed
from cpt_lightning.cli.rehearse.watch import LOADING, UPDATE, Watch
from cpt_lightning.data import TRAINER_OPTIONS
from cpt_lightning.modules import MultiTask, OnPolicySFT, PostTraining
from cpt_lightning.modules.group_rollouts import GroupRollouts

DESCRIPTION = """\
Runs the largest steps that a run may have, on its devices and with its strategy: prompts of the longest length with
images as large as they may be, completions that use up all their tokens, every group with something to learn, an
evaluation batch of the same, and what methods and measurements (EWC, Drift, ...) and the rollout filter do with such
rows. Says what each part takes of time and memory, and how long the run will take at most. What is learned is thrown
away, and nothing is written. Ends with 1 if memory does not suffice.

So a run does not end after a day at its first batch of large images. Callbacks of your own are not rehearsed, and the
data need not be there yet. `cpt plan` says what memory is needed without a GPU.

for example:
  cpt rehearse -c configs/demo/grpo.yaml --rehearse.prompt_tokens 75
  cpt rehearse -c configs/qwen2_5_vl_7b/grpo.yaml -c configs/strategy/fsdp2.yaml
  cpt rehearse -c configs/demo/sft.yaml -c configs/methods/ewc.yaml --rehearse.prompt_tokens 75
  srun cpt rehearse -c configs/qwen2_5_vl_7b/grpo.yaml -c configs/strategy/fsdp2.yaml --trainer.num_nodes 2
"""

AS_IN_THE_RUN = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "plugins", "sync_batchnorm", "deterministic",
    "benchmark", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "detect_anomaly",
)  # fmt: skip
"""Options of the Trainer that a rehearsal takes over."""


@dataclass
class Rehearsal(Sizes):
    """What to rehearse.

    Args:
        steps: Optimizer steps of each kind; the first one also sets libraries up, the last one is timed.

    Raises:
        ValueError: A number below its least.
    """

    steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ValueError(f"steps={self.steps}; give at least 2, for the optimizer has its state after the first")


class RehearseCLI(BeforehandCLI):
    """Makes what ``cpt fit`` would, and runs the largest batches in the place of the stream's."""

    verb, options, description = "rehearse", Rehearsal, DESCRIPTION
    trainer: RunTrainer
    model: PostTraining

    def instantiate_trainer(self, **kwargs) -> RunTrainer:
        """The Trainer of the run, which leaves nothing behind."""
        given = self.config_init.trainer
        callbacks, judge = self.beside
        self.rehearsed = callbacks if judge is None else [*callbacks, FilterTrial(judge)]
        return RunTrainer(
            **{name: getattr(given, name) for name in AS_IN_THE_RUN if getattr(given, name) is not None},
            **TRAINER_OPTIONS, max_epochs=len(self.stages), limit_val_batches=1, callbacks=list(self.rehearsed),
            logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip

    def rehearse(self) -> None:
        """Runs and prints.

        Raises:
            SystemExit: With 1 if memory does not suffice, with 2 if nothing says how large rows may be.
        """
        options: Rehearsal = self.config_init.rehearse
        try:
            workload = self.workload(options)
        except ValueError as error:
            self.parser.error(str(error))
        out, trainer, module = console(), self.trainer, self.model
        if trainer.is_global_zero:
            out.print(what_is_rehearsed(module, workload, options.steps, trainer, self.rehearsed), soft_wrap=True)
        make_endless(module)
        num_batches = options.steps * workload.accumulate_grad_batches
        with TemporaryDirectory(prefix="cpt_rehearse_") as trainer.run_dir, _saying() as say:  # for measurements
            watch = Watch(say, self.rehearsed)
            trainer.callbacks.append(watch)
            try:
                with saying_complaints(self.command):
                    batches = LargestBatches(self.datamodule, self.stages, workload, module, num_batches)
                    trainer.fit(module, datamodule=batches)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise SystemExit(_no_room(module, watch.now, error)) from None
        parts, memory = watch.parts(trainer), DeviceMemory(trainer.strategy.root_device, trainer.num_devices)
        if trainer.is_global_zero:
            duration = duration_of(self.datamodule, module.processor, parts)
            out.print(part_table(parts, memory))
            out.print(room_line(parts, memory), *duration_lines(duration), sep="\n", soft_wrap=True)

    @property
    def stages(self) -> list[list[str]]:
        """A task of each objective; where callbacks remember tasks, the last one behind all others."""
        names = self.datamodule.task_names
        if isinstance(self.model, MultiTask):
            objectives = {self.model.objectives.get(name, self.model.objective): name for name in reversed(names)}
            return [[name] for name in objectives.values()]
        if self.rehearsed and self.datamodule.num_stages > 1:
            return [names[:-1] or names, names[-1:]]
        return [names[:1]]


def make_endless(module: PostTraining) -> None:
    """Lets no completion of a module end before its last token, and learns them all the same."""
    module.processor.stop_token_ids = []
    if isinstance(module, GroupRollouts):
        module.learn_truncated = True
    if isinstance(module, OnPolicySFT):
        module.selection = replace(
            module.selection, correct_only=False, threshold=1.0, finished_only=False, distinct=False
        )
        module.hint = None  # whose prompts would be those of the rows


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _no_room(module: PostTraining, part: str, error: RuntimeError) -> str:
    mend = ADVICE["weights"] if part == LOADING else ADVICE_BY_PHASE.get(part, CALLBACK_ADVICE)
    if part == UPDATE and not isinstance(module, GroupRollouts):
        mend = SFT_ADVICE
    return f"out of memory in the {part}: {str(error).splitlines()[0]}\nwhat makes it smaller: {mend}"


@contextmanager
def _saying() -> Iterator[Callable[[str], None]]:
    """Shows a person at a terminal what is being run."""
    out = console()
    if not out.is_terminal or rank_zero_only.rank:
        yield lambda phase: None
        return
    with out.status("loading") as status:
        yield status.update
