"""Adapters along the stream: one for all tasks, one that is merged and renewed, or one for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor, nn

from cpt_lightning.models.adapted_layers import begin_adapters_anew, merge_earlier, merge_into_base
from cpt_lightning.models.adapters import AlongStream, adapter_weights, adapters_replaced
from cpt_lightning.modules.compatibility import KEY
from cpt_lightning.modules.resumable import Resumable
from cpt_lightning.rollouts.sampling import keyed_generator


class TaskAdapters(Resumable):
    """A module whose adapters begin every task as ``backbone.lora.along_stream`` says.

    The adapters that training sees are always the same parameters, with other values in them. What they were at the end
    of each earlier stage is kept, and is in the checkpoint: with ``per_task`` to evaluate by, with ``renewed`` because
    the weights that they were merged into are not; these are merged again, in the same order, on loading.

    A task's new adapter is there from the module's ``on_train_epoch_start`` on, which runs after that of callbacks.
    """

    seed: int

    def __init__(self) -> None:
        super().__init__()
        self.earlier = nn.ModuleList()  # the adapters of each stage before this one
        self.stages_begun: list[list[str]] = []  # the tasks of each, this one included

    @property
    def along_stream(self) -> AlongStream:
        """What becomes of the adapters when the next task begins."""
        return self.backbone.lora.along_stream

    def on_train_epoch_start(self) -> None:
        """A task begins: with the adapters of the task before, or with new ones."""
        super().on_train_epoch_start()
        if self.along_stream == "shared":
            return
        stage = len(self.stages_begun)  # of another stream before this one too, from which the module was loaded
        if stage > 0:
            self.earlier.append(_frozen(adapter_weights(self.model)))
            if self.along_stream == "renewed":
                merge_into_base(self.model)
            begin_adapters_anew(self.model, keyed_generator("cpu", self.seed, stage).initial_seed())
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()  # moments of another adapter, if the optimizer itself is kept
        self.stages_begun.append(list(self.trainer.datamodule.stages[self.trainer.current_epoch]))

    def check_fit(self, trainer: L.Trainer) -> None:
        """Refuses a precision in which nothing is learned, and adapters of tasks without tasks.

        Raises:
            ValueError: Names the option and the mend.
        """
        super().check_fit(trainer)
        if trainer.precision == "16-true":
            raise ValueError(
                "trainer.precision=16-true: float16 weights and moments overflow in a few steps; use bf16-true or "
                "bf16-mixed"
            )
        if self.along_stream != "shared" and trainer.datamodule is None:
            raise ValueError(
                f"backbone.lora.along_stream={self.along_stream} needs a stream of tasks: "
                "call trainer.fit(module, datamodule=stream)"
            )

    @contextmanager
    def adapters_of(self, task: str) -> Iterator[None]:
        """The model with the adapters that belong to a task, for as long as it lasts."""
        stages = [stage for stage, tasks in enumerate(self.stages_begun) if task in tasks]
        if self.along_stream != "per_task" or not stages or stages[-1] == len(self.earlier):
            yield
            return
        with adapters_replaced(self.model, self.earlier[stages[-1]].parameters()):
            yield

    # -- in the checkpoint -----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds which tasks the adapters belong to."""
        super().on_save_checkpoint(checkpoint)
        if KEY in checkpoint:
            checkpoint[KEY]["stages_begun"] = self.stages_begun

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for the adapters of earlier stages, and merges them again if that is what became of them."""
        if self.along_stream == "shared":
            super().on_load_checkpoint(checkpoint)
            return
        self.stages_begun = [list(tasks) for tasks in checkpoint.get(KEY, {}).get("stages_begun", [])]
        if self.earlier and self.along_stream == "renewed":
            self.model.load_state_dict(self.load_model().state_dict())
        if self._trainer is not None:  # where it was merged first: another device rounds otherwise
            self.model.to(self._trainer.strategy.root_device)
        self.earlier = nn.ModuleList(_frozen(adapter_weights(self.model)) for _ in self.stages_begun[1:])
        super().on_load_checkpoint(checkpoint)
        if self.along_stream == "renewed":
            merge_earlier(self.model, checkpoint["state_dict"])


def _frozen(weights: Iterable[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(weight.detach().clone(), requires_grad=False) for weight in weights)
