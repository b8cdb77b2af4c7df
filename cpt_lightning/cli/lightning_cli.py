"""Lightning's command line with this project's stream, modules, callbacks and defaults."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from cpt_lightning.callbacks import (
    CompletionPanel,
    ContinualLearning,
    RolloutFilter,
    SampleLog,
    SkippedRows,
    StreamPictures,
    TaskCheckpoint,
    TaskExport,
    TaskProgressBar,
    TestScores,
)
from cpt_lightning.callbacks.checks import ChecksFit
from cpt_lightning.callbacks.continuation import unmeasured
from cpt_lightning.callbacks.display.loggers import check_names
from cpt_lightning.checkpoint_io import check_resumable, next_step, read_checkpoint
from cpt_lightning.cli import VERBS
from cpt_lightning.cli.console import rank, tidy
from cpt_lightning.cli.double_keys import refuse_double_keys
from cpt_lightning.cli.errors import is_debugged, refusal, saying_complaints
from cpt_lightning.cli.launched import check_launched, tell_lightning
from cpt_lightning.cli.option_parser import OptionParser
from cpt_lightning.cli.run_directory import Claim, check_claimed, last_checkpoint, run_directory
from cpt_lightning.cli.run_record import RunRecord
from cpt_lightning.data import TRAINER_OPTIONS, TaskStream
from cpt_lightning.modules import PostTraining  # its strategy registers itself as fsdp2
from cpt_lightning.modules.compatibility import check_ours
from cpt_lightning.report.summary import print_summary

USAGE = "cpt {} -c CONFIG.yaml [--ckpt_path CHECKPOINT] [--OPTION VALUE ...]"
TRAINER_DEFAULTS = {
    **TRAINER_OPTIONS,
    "enable_model_summary": False,  # the module says in a line what is trained
}

PARSER_OPTIONS = {"prog": "cpt", "description": "Continual post-training of multimodal language models."}


def seed_number(seed: int | bool | None) -> int:
    """The seed of data and module.

    Raises:
        ValueError: It is no number: Lightning would draw one, or none, and the run could not be repeated.
    """
    if seed is None or isinstance(seed, bool):
        raise ValueError(f"seed_everything={seed} must be a whole number, without which no run can be repeated")
    return seed


class RunTrainer(Trainer):
    """A Trainer whose files lie in the run's folder, whatever loggers it has and wherever these write."""

    run_dir: str | None = None

    @property
    def log_dir(self) -> str | None:
        """The run's folder, that of rank 0: all ranks must ask."""
        return super().log_dir if self.run_dir is None else self.strategy.broadcast(self.run_dir)


class CPTCLI(LightningCLI):
    """Parses the arguments, makes trainer, module and stream, and runs the verb.

    Args:
        args: What follows ``cpt`` on the command line.
        run: Whether these name a verb of the Trainer, which is run.
        **parser_options: Of the parser, in place of its own.
    """

    def __init__(self, args: list[str], run: bool = True, **parser_options: Any):
        self.args = args
        self.first_step = 0
        self.checkpoint: dict[str, Any] | None = None  # without the tensors of weights and optimizers
        self._claim = Claim()
        self._began = time.monotonic()
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls it by old names
        tidy()
        refuse_double_keys()
        try:
            self._make_and_run(run, parser_options)
        finally:
            self._claim.release()

    def _make_and_run(self, run: bool, parser_options: dict[str, Any]) -> None:
        super().__init__(
            model_class=PostTraining,
            subclass_mode_model=True,
            datamodule_class=TaskStream,
            trainer_class=RunTrainer,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            save_config_callback=RunRecord,
            save_config_kwargs={"arguments": self.args, "overwrite": True},  # a resumed run goes on in its folder
            seed_everything_default=0,
            parser_class=OptionParser,
            parser_kwargs={**PARSER_OPTIONS, **parser_options},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=self.args,
            run=run,
        )

    # -- arguments -------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is not an argument of trainer, model or data."""
        parser.add_argument(
            "--run_dir",
            type=str,
            default="runs/run",
            help=(
                "Folder of all that the run leaves behind. If it holds a run already, the next free name is taken; "
                "with --ckpt_path of a run, that run goes on in its own folder."
            ),
        )
        parser.add_lightning_class_args(ContinualLearning, "continual")
        parser.add_lightning_class_args(TaskCheckpoint, "checkpoint")
        parser.add_lightning_class_args(TaskExport, "export")
        parser.set_defaults({"export.when": "never"})
        parser.add_lightning_class_args(SampleLog, "samples")
        parser.add_lightning_class_args(StreamPictures, "pictures")
        parser.add_lightning_class_args(CompletionPanel, "completions")
        parser.add_argument(
            "--filter_from",
            type=str | None,
            default=None,
            help="Folder of a run whose verdicts (in its filter/) the rollout filter takes over instead of judging.",
        )
        parser.add_lightning_class_args(RolloutFilter, "filter")
        parser.link_arguments("filter_from", "filter.filter_from")
        # One number for all that is random, so that another seed is another run in every respect.
        for target in ("data.seed", "model.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=seed_number)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, and which arguments of the Trainer's methods are not options."""
        verbs = LightningCLI.subcommands()
        # Checkpoints are read as data only, and nothing switches that off.
        return {verb: skipped | {"weights_only"} for verb, skipped in verbs.items() if verb in VERBS}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # The parsers of the other verbs would be as large and are not asked anything.
        if subcommand == self.args[0]:
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
            parser.usage = USAGE.format(subcommand)
            if subcommand in ("validate", "test"):
                parser.set_defaults({"verbose": False})  # of Lightning's table, which a table of ours replaces
            return parser
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        """Parses; Lightning's own warns whenever arguments are given as a list."""
        parser.usage = parser.usage or USAGE.format(args[0])  # of the verb, whose name no option comes before
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: our checkpoints hold no options, and Lightning would read the whole file to look for them."""

    # -- trainer ---------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Settles checkpoint and folder, so that the configuration that is saved is the one that is run."""
        config = self.config[self.subcommand]
        if not config.run_dir or config.trainer is None:
            option = "run_dir" if config.trainer is not None else "trainer"
            self._refuse(f"{option} is empty; leave it out, which takes the default, or give it something")
        wants_last = config.ckpt_path == "last"
        if wants_last:
            config.ckpt_path = last_checkpoint(config.run_dir)
        if config.ckpt_path:
            self._look_into(Path(config.ckpt_path))
        elif wants_last and self.subcommand != "fit":
            self._refuse(f"--ckpt_path last: there is no last.ckpt in run_dir={config.run_dir}")
        try:
            self._settle_folder(config, starts_there=wants_last and not config.ckpt_path)
        except ValueError as error:
            self._refuse(str(error))
        if self.subcommand != "fit":
            self.save_config_callback = None  # config.yaml is the one that trained

    def _settle_folder(self, config: Namespace, starts_there: bool) -> None:
        """Chooses the run's folder, and keeps other processes out of it as long as this one learns."""
        writes_run = self.subcommand == "fit" and not config.trainer.fast_dev_run
        claim = self._claim if writes_run and rank() == 0 else None
        if starts_there:
            check_claimed(Path(config.run_dir), claim)
            return
        named = any(arg.split("=")[0] == "--run_dir" for arg in self.args)
        config.run_dir = str(run_directory(config.run_dir, config.ckpt_path, named, claim))

    def _look_into(self, path: Path) -> None:
        """Refuses a checkpoint that could not be used, before anything large is loaded."""
        try:
            self.checkpoint = read_checkpoint(path, parts=())
            check_ours(str(path), self.checkpoint)
            if self.subcommand == "fit":
                check_resumable(self.checkpoint, path)
                self.first_step = next_step(self.checkpoint)
        except ValueError as error:
            self._refuse(f"--ckpt_path {error}")

    def instantiate_classes(self) -> None:
        """Makes trainer, module and stream; what one of them refuses is said in a line.

        Raises:
            SystemExit: With 2, after the line. ``JSONARGPARSE_DEBUG=true`` shows where the error came from instead.
        """
        try:
            tell_lightning()
            super().instantiate_classes()
            if self.trainer is not None:
                check_launched(self.trainer.num_nodes, self.trainer.num_devices)
        except (ValueError, MisconfigurationException) as error:
            if is_debugged():
                raise
            self._refuse(refusal(error))

    def _refuse(self, why: str) -> NoReturn:
        print(f"{self.command}: error: {why}", file=sys.stderr)
        raise SystemExit(2) from None

    @property
    def command(self) -> str:
        """What was typed, without its options."""
        return " ".join(filter(None, [self.parser.prog, self.subcommand]))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that writes into the run directory, and whose epochs are the stages of the stream."""
        config = self.config_init[self.subcommand]
        options = config.trainer
        if options.default_root_dir is None:
            kwargs["default_root_dir"] = config.run_dir
        if options.logger is None and not options.fast_dev_run:
            kwargs["logger"] = TensorBoardLogger(config.run_dir, name="", version="")
        if options.max_epochs is None:
            kwargs["max_epochs"] = self.datamodule.num_stages
        own = options.callbacks or []
        own = list(own) if isinstance(own, list) else [own]
        own += [SkippedRows(), TestScores()]
        if options.enable_progress_bar is not False and not any(isinstance(callback, ProgressBar) for callback in own):
            own.insert(0, TaskProgressBar())  # its line ends before others print
        if options.fast_dev_run:
            rank_zero_info("fast_dev_run leaves nothing behind")
        else:
            rank_zero_info(f"run directory: {config.run_dir}")
        trainer = super().instantiate_trainer(callbacks=own, **kwargs)
        trainer.run_dir = config.run_dir
        check_names(trainer.loggers, [*self.datamodule.task_names, *self.datamodule.probe_names])
        for logger in trainer.loggers:
            if self.subcommand == "fit" and isinstance(logger, TensorBoardLogger):
                # What a killed run logged after its last checkpoint, or before its first one, is taken back.
                logger._kwargs["purge_step"] = self.first_step
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs a verb."""
        with saying_complaints(self.command):
            if self.checkpoint is not None:
                where = f"checkpoint {self.config_init[subcommand].ckpt_path}"
                self.model.check_checkpoint(where, self.checkpoint, is_fitting=subcommand == "fit")
            super()._run_subcommand(subcommand)

    # -- verbs -----------------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Evaluates the untrained base, or a checkpoint on what the stream was extended by since."""
        # What is wrong with the stream or its files should show before an evaluation that may take an hour.
        self.datamodule.trainer, self.trainer.datamodule = self.trainer, self.datamodule
        self.datamodule.setup("fit")
        if self.trainer.fast_dev_run or not self.trainer.limit_val_batches:
            return
        path = self.config_init["fit"].ckpt_path
        self.model.check_fit(self.trainer)
        for callback in self.trainer.callbacks:
            if isinstance(callback, ChecksFit):
                callback.check_fit(self.trainer, self.model)
                if self.checkpoint is not None:
                    callback.check_resume(self.trainer, self.model, self.checkpoint, path)
        names = self.datamodule.asked
        if self.checkpoint is not None:
            names = unmeasured(self.trainer, self.checkpoint)
            self.datamodule.check_resume(self.checkpoint)
            if names:
                rank_zero_info(f"evaluated first, for the checkpoint was not asked about it: {', '.join(names)}")
        if names:
            with self.datamodule.asking(names):
                self.trainer.validate(self.model, datamodule=self.datamodule, ckpt_path=path, verbose=False)

    def after_fit(self) -> None:
        """Says what was learned, lost and spent, and what to do next."""
        config = self.config_init["fit"]
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run and self.trainer.state.finished:
            print_summary(Path(config.run_dir), time.monotonic() - self._began)
