"""Learning-rate schedules that last as long as a task."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class TaskSchedule(LambdaLR):
    """Warm-up, then constant or falling to a floor at the end of the task.

    How many steps the task has is told by the module when the task starts (``start_task``), because it is known only
    then. Where the optimizer is kept over tasks, the schedule begins anew all the same.

    Args:
        optimizer: The optimizer.
        warmup: Steps (a whole number) or share of the task (below 1) over which the rate rises linearly.
        decay: What follows the warm-up.
        floor: Share of the learning rate that is left at the end of a ``linear`` or ``cosine`` decay.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0,
        decay: Literal["constant", "linear", "cosine"] = "constant",
        floor: float = 0.0,
    ):
        if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
            raise ValueError(f"warmup={warmup}: give a whole number of steps or a share of the task below 1")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor={floor} is a share of the learning rate and must lie in [0, 1]")
        self.warmup, self.decay, self.floor = warmup, decay, floor
        self.total_steps: int | None = None
        self.first_step = 0
        super().__init__(optimizer, self.factor)

    def start_task(self, total_steps: int) -> None:
        """A task of so many optimizer steps begins, or goes on after a resume; sets the rate of the coming step."""
        if self.last_epoch - self.first_step >= (self.total_steps or total_steps):
            self.first_step = self.last_epoch  # the last task is over
        self.total_steps = total_steps
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step counted from 0, over all tasks of the optimizer."""
        if self.total_steps is None:  # the task has not begun: the rate is set when it does
            return 1.0
        step -= self.first_step
        warmup = self.warmup if self.warmup >= 1 else self.warmup * self.total_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1.0, self.total_steps - warmup))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.floor + (1 - self.floor) * left
