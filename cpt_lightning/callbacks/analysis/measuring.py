"""What callbacks share that measure the model on fixed prompts, beside the base and aside of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning import LightningModule, Trainer

from cpt_lightning.callbacks.analysis.base_model import BaseModel
from cpt_lightning.callbacks.analysis.recorder import Recorder
from cpt_lightning.rollouts import Sampling, sample_groups
from cpt_lightning.rollouts.sampling import row_generators, with_prefix
from cpt_lightning.types import Completions, Prompts

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL


@dataclass
class Asked:
    """The fixed prompts of a task or probe, and what the base answered.

    Args:
        num_rows: Prompts, over all ranks.
        mine: Numbers of those that this rank measures.
        prompts: These, if there are any.
        answers: The base's, one each.
    """

    num_rows: int
    mine: list[int]
    prompts: Prompts | None = None
    answers: Completions | None = None


class Measuring(Recorder):
    """Asks the base fixed prompts of every task and probe before training, and keeps a record of what is measured.

    The prompts are from the split that is evaluated (``data.evaluate_on``), evenly spaced, and shared out over ranks.
    A resumed run gets the same answers, and goes on with the record of its checkpoint. What all of it took is printed
    at the end of the run.

    Args:
        num_rows: Prompts of each task and probe.
        max_new_tokens: Longest answer.
        every_n_steps: How often is measured.
        temperature: That the answers are drawn with.

    Raises:
        ValueError: A count below 1, or a checkpoint that was measured otherwise.
    """

    def __init__(self, num_rows: int, max_new_tokens: int, every_n_steps: int | None, temperature: float = 1.0) -> None:
        super().__init__()
        counts = {"num_rows": num_rows, "max_new_tokens": max_new_tokens, "every_n_steps": every_n_steps}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{type(self).__name__}: {name}={count} must be at least 1")
        self.num_rows = num_rows
        self.sampling = Sampling(max_new_tokens, temperature=temperature)
        self.every_n_steps = every_n_steps
        self._asked: dict[str, Asked] = {}
        self._base: BaseModel | None = None

    def check_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a Trainer that has no stream to take prompts from."""
        if trainer.datamodule is None:
            name = type(self).__name__
            raise ValueError(f"{name} needs a stream of tasks: call trainer.fit(module, datamodule=stream)")

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks the base; a resumed run gets the same answers."""
        super().on_train_start(trainer, pl_module)
        stream = trainer.datamodule
        with self.timed():
            base = self._base = _loaded(trainer, pl_module) or BaseModel(trainer, pl_module)
            with base.gathered(), trainer.precision_plugin.forward_context():
                for name in [*stream.task_names, *stream.probe_names]:
                    self._asked[name] = self._ask(trainer, pl_module, base, name)
        self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what all of it cost, and gives the copy's memory back."""
        super().on_train_end(trainer, pl_module)
        self._base = None
        self._asked = {}

    # -- asking ------------------------------------------------------------------------------------------------------

    def _ask(self, trainer: Trainer, module: LightningModule, base: BaseModel, name: str) -> Asked:
        """The base's answers, begun as evaluations have them begin."""
        prefix = module.processor.encode_prefix(module.evaluation.prefix)
        every = with_prefix(trainer.datamodule.rows_of_evaluation(name, self.num_rows).prompts, prefix)
        mine = list(range(trainer.global_rank, len(every), trainer.world_size))
        if not mine:
            return Asked(len(every), mine)
        prompts = every.select(mine)
        here = trainer.strategy.batch_to_device(prompts)
        with base.model() as model:
            return Asked(len(every), mine, prompts, self.answers(model, module, here).to("cpu"))

    def answers(self, model: QwenVL, module: LightningModule, prompts: Prompts) -> Completions:
        """An answer to each prompt; a row draws with the same random numbers whenever it is asked."""
        generators = row_generators(module.device, prompts, module.seed)
        return sample_groups(model, module.processor, prompts, 1, self.sampling, generators)

    @contextmanager
    def aside(self, trainer: Trainer, module: LightningModule) -> Iterator[BaseModel]:
        """The base, beside a model that may be looked at; the time within is no part of the step."""
        base = self._base
        assert base is not None, "training has begun"
        precision = trainer.precision_plugin.forward_context()
        with self.timed(), module.account.aside(), base.gathered(), precision:
            yield base

    @property
    def settings(self) -> dict[str, int]:
        """What is asked, and how long answers may be."""
        return {"num_rows": self.num_rows, "max_new_tokens": self.sampling.max_new_tokens}


def _loaded(trainer: Trainer, module: LightningModule) -> BaseModel | None:
    """The base that another callback has of this model: one serves all."""
    others = (callback._base for callback in trainer.callbacks if isinstance(callback, Measuring))
    return next((base for base in others if base is not None and base.trained is module.model), None)
