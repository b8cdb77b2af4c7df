"""What the parts of a run take: seconds, and memory of the device at most."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from cpt_lightning.cli.rehearse.filter_trial import name_of
from cpt_lightning.cli.rehearse.memory import DeviceMemory
from cpt_lightning.types import Batch

LOADING, UPDATE, EVALUATION = "loading", "update", "evaluation"
HOOKS = [name for name in dir(Callback) if name.startswith("on_")]


@dataclass
class Part:
    """What a part of a step, an evaluation batch or a callback took on the rank where it took most.

    Args:
        name: Of the part.
        seconds: In the last step of each kind, of the kind where it takes longest; of a callback the longest call.
        peak_bytes: Memory at most, all that is there meanwhile included.
        is_of_step: Whether every step has it.
    """

    name: str
    seconds: float
    peak_bytes: int
    is_of_step: bool = True


class Watch(Callback):
    """Times the parts of steps and what callbacks do, and looks at the memory of each.

    Args:
        say: Is told what the run is at.
        beside: Callbacks of the Trainer, each of which is a part.
    """

    def __init__(self, say: Callable[[str], None], beside: Sequence[Callback] = ()) -> None:
        self.say = say
        self.beside = beside
        self._now = LOADING
        self._begun: float | None = None
        self._kind = ""
        self._seconds: dict[str, dict[str, float]] = {}
        self._longest_call: dict[str, float] = {}
        self._peaks: dict[str, int] = {}

    @property
    def now(self) -> str:
        """The part that is being run; a step that says no more is all update."""
        return self._now or UPDATE

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has the module say what a step is at, and looks at what callbacks do."""
        self._memory = DeviceMemory(trainer.strategy.root_device)
        pl_module.on_phase = self._phase
        for callback in self.beside:
            for hook in HOOKS:
                if getattr(type(callback), hook) is not getattr(Callback, hook):
                    setattr(callback, hook, self._watched(name_of(callback), getattr(callback, hook)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves module and callbacks as they were."""
        pl_module.on_phase = None
        for callback in self.beside:
            for hook in HOOKS:
                vars(callback).pop(hook, None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """A step begins."""
        self._begin(batch.prompts.examples[0].task, "")

    def on_train_batch_end(self, *_) -> None:
        """A step has ended."""
        self._leave_step()

    def on_validation_batch_start(self, *_) -> None:
        """An evaluation batch begins."""
        self._begin(EVALUATION, EVALUATION)

    def on_validation_batch_end(self, *_) -> None:
        """It has ended."""
        self._leave_step()

    def parts(self, trainer: Trainer) -> list[Part]:
        """Those of steps in their order, the evaluation, and callbacks; every rank must ask."""
        of_steps = dict.fromkeys(name for kind in self._seconds.values() for name in kind if name != EVALUATION)
        seconds = {
            name: max(kind.get(name, 0.0) for kind in self._seconds.values()) for name in [*of_steps, EVALUATION]
        } | self._longest_call
        figures = [list(seconds.values()), [self._peaks[name] for name in seconds]]
        mine = torch.tensor(figures, dtype=torch.float64, device=self._memory.device).T
        most = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        return [Part(name, took, int(peak), name in of_steps) for name, (took, peak) in zip(seconds, most, strict=True)]

    def _watched(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook of a callback, within a step or between two."""

        def watched(*args: Any) -> Any:
            before, is_within_step = self.now, self._begun is not None
            self._leave_step()
            self.say(name)
            self._enter(name)
            result = hook(*args)
            self._longest_call[name] = max(self._longest_call.get(name, 0.0), self._leave())
            self._now = before
            if is_within_step:
                self._enter(before)
            return result

        return watched

    def _begin(self, kind: str, part: str) -> None:
        self._kind, self._seconds[kind] = kind, defaultdict(float)
        self.say(part or kind)
        self._enter(part)

    def _phase(self, phase: str) -> None:
        """``rollout 1-4/16: 3/64 tokens`` is part of ``rollout``."""
        name = phase.split(" ")[0]
        if self._now and name != self._now:
            self._leave_step()
            self._enter(name)
        self._now = name
        self.say(phase)

    def _enter(self, name: str) -> None:
        self._now = name
        self._memory.forget_peak()
        self._begun = time.perf_counter()

    def _leave_step(self) -> None:
        self._now = self.now
        if self._begun is not None:
            self._seconds[self._kind][self._now] += self._leave()

    def _leave(self) -> float:
        """Seconds of what is left."""
        assert self._begun is not None
        if self._memory.is_gpu:
            torch.cuda.synchronize(self._memory.device)
        seconds = time.perf_counter() - self._begun
        self._begun = None
        self._peaks[self._now] = max(self._peaks.get(self._now, 0), self._memory.peak)
        return seconds
