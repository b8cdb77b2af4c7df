"""What the parts of a run take: seconds, and memory of the device at most."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from cpt_lightning.cli.rehearse.memory import DeviceMemory
from cpt_lightning.types import Batch

LOADING, UPDATE, EVALUATION = "loading", "update", "evaluation"


@dataclass
class Part:
    """What a part of a step, or an evaluation batch, took on the rank where it took most.

    Args:
        name: Of the part.
        seconds: In the last step of each kind; of the kind where it takes longest.
        peak_bytes: Memory at most, all that is there meanwhile included.
    """

    name: str
    seconds: float
    peak_bytes: int


class Watch(Callback):
    """Times the parts of steps, and looks at the memory of each.

    Args:
        say: Is told what the run is at.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._now = LOADING
        self._begun: float | None = None
        self._kind = ""
        self._seconds: dict[str, dict[str, float]] = {}
        self._peaks: dict[str, int] = {}

    @property
    def now(self) -> str:
        """The part that is being run; a step that says no more is all update."""
        return self._now or UPDATE

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has the module say what a step is at."""
        self._memory = DeviceMemory(trainer.strategy.root_device)
        pl_module.on_phase = self._phase

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the module."""
        pl_module.on_phase = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """A step begins."""
        self._begin(batch.prompts.examples[0].task, "")

    def on_train_batch_end(self, *_) -> None:
        """A step has ended."""
        self._now = self.now
        self._leave()

    def on_validation_batch_start(self, *_) -> None:
        """An evaluation batch begins."""
        self._begin(EVALUATION, EVALUATION)

    def on_validation_batch_end(self, *_) -> None:
        """It has ended."""
        self._leave()

    def parts(self, trainer: Trainer) -> list[Part]:
        """All parts in their order, the evaluation last; every rank must ask."""
        seconds = [max(kind.get(name, 0.0) for kind in self._seconds.values()) for name in self._peaks]
        mine = torch.tensor([seconds, list(self._peaks.values())], dtype=torch.float64, device=self._memory.device).T
        most = trainer.strategy.reduce(mine, reduce_op="max")
        return [Part(name, took, int(peak)) for name, (took, peak) in zip(self._peaks, most.tolist(), strict=True)]

    def _begin(self, kind: str, part: str) -> None:
        self._kind, self._seconds[kind] = kind, defaultdict(float)
        self.say(part or kind)
        self._enter(part)

    def _phase(self, phase: str) -> None:
        """``rollout 1-4/16: 3/64 tokens`` is part of ``rollout``."""
        name = phase.split(" ")[0]
        if self._now and name != self._now:
            self._leave()
            self._enter(name)
        self._now = name
        self.say(phase)

    def _enter(self, name: str) -> None:
        self._now = name
        self._memory.forget_peak()
        self._begun = time.perf_counter()

    def _leave(self) -> None:
        if self._begun is None:
            return
        if self._memory.is_gpu:
            torch.cuda.synchronize(self._memory.device)
        seconds = time.perf_counter() - self._begun
        self._begun = None
        self._seconds[self._kind][self._now] += seconds
        self._peaks[self._now] = max(self._peaks.get(self._now, 0), self._memory.peak)
