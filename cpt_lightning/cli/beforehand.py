"""What comes before a run: verbs that parse what ``cpt fit`` parses, and leave nothing of a run behind."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from cpt_lightning.callbacks.analysis.recorder import Recorder
from cpt_lightning.callbacks.filter.judge import Judge
from cpt_lightning.callbacks.methods.kept_weights import KeptWeights
from cpt_lightning.cli.inspect.stream import Unopened
from cpt_lightning.cli.lightning_cli import CPTCLI, RunTrainer
from cpt_lightning.cli.plan.phases import Workload
from cpt_lightning.tasks import Task


@dataclass
class Sizes:
    """How large the largest rows are.

    Args:
        prompt_tokens: Of the longest prompt; ``data.max_prompt_tokens`` by default. ``cpt inspect`` measures it.
        target_tokens: Of the longest SFT target. ``cpt inspect`` measures it.
        images: Images of every prompt, as large as ``backbone.max_pixels`` and the prompt allow.

    Raises:
        ValueError: A number below its least.
    """

    prompt_tokens: int | None = None
    target_tokens: int = 256
    images: int = 1

    def __post_init__(self) -> None:
        for name, lowest in {"prompt_tokens": 1, "target_tokens": 1, "images": 0}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name}={value}; give at least {lowest}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, with the lines of the description as they are."""


class BeforehandCLI(CPTCLI):
    """Makes what the arguments of ``cpt fit`` describe, without weights and without a Trainer.

    Data that cannot be opened are no obstacle.

    Args:
        args: What follows the verb on the command line.
    """

    verb: ClassVar[str]
    options: ClassVar[type]
    description: ClassVar[str]

    def __init__(self, args: list[str]):
        super().__init__(
            args,
            run=False,  # no verb of the Trainer; the options stand at the top, as in the files
            prog=f"cpt {self.verb}",
            usage=f"cpt {self.verb} -c CONFIG.yaml [--{self.verb}.OPTION VALUE ...] [--OPTION VALUE ...]",
            description=self.description,
            formatter_class=HelpFormatter,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """This verb's own options come first in the help."""
        parser.add_class_arguments(self.options, self.verb)
        super().add_default_arguments_to_parser(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of ``cpt fit``, so that its configs parse; a stream alone is measured with the embedded base."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(Trainer, "fit", skip=self.subcommands()["fit"])
        parser.set_defaults({"model": {"class_path": "cpt_lightning.modules.SFT"}})

    def _set_seed(self) -> None:
        """Nothing: sources have seeds of their own, and nothing is drawn besides."""

    def before_instantiate_classes(self) -> None:
        """A task whose files are missing keeps the reason, and the others are opened."""
        for group in ("tasks", "probes"):
            for task in (self.config.data[group] or {}).values():
                if (error := _failure(task)) is not None:
                    unopened = f"{Unopened.__module__}.{Unopened.__qualname__}"
                    task.source = Namespace(class_path=unopened, init_args=Namespace(error=error))

    def instantiate_trainer(self, **kwargs: Any) -> RunTrainer | None:
        """None is needed, mostly."""
        return None

    @property
    def beside(self) -> tuple[list[Callback], Judge | None]:
        """The run's callbacks that keep weights or look at the model, and the filter's judge if rows are judged."""
        callbacks, chosen = self.config_init.trainer.callbacks or [], self.config_init.filter
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        found = [callback for callback in callbacks if isinstance(callback, KeptWeights | Recorder)]
        return found, chosen.judge if chosen.is_on and chosen.filter_from is None else None

    def workload(self, sizes: Sizes) -> Workload:
        """The largest batches of the run.

        Raises:
            ValueError: Nothing says how long a prompt may be.
        """
        data = self.datamodule
        prompt_tokens = sizes.prompt_tokens or data.max_prompt_tokens
        if prompt_tokens is None:
            raise ValueError(
                "data.max_prompt_tokens is null: nothing says how long a prompt may be; give "
                f"--{self.verb}.prompt_tokens, which cpt inspect measures"
            )
        return Workload(
            prompt_tokens=prompt_tokens,
            target_tokens=sizes.target_tokens,
            num_images=sizes.images,
            prompts_per_step=data.prompts_per_step,
            eval_prompts_per_step=data.eval_prompts_per_step,
            accumulate_grad_batches=self.config.trainer.accumulate_grad_batches,
        )


def _failure(task: Namespace) -> str | None:
    """Why a task cannot be made, in its own words; ``None`` if it can."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    try:
        parser.instantiate(Namespace(task=task))
    except (ValueError, OSError) as error:
        return str(error)
    return None
