"""A callback that measures training steps end to end: data loading, hooks and logging included."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from time import perf_counter

from lightning import Callback
from lightning.pytorch.profilers import SimpleProfiler

AROUND_THE_STEP = ("train_dataloader_next", ".batch_to_device", "on_train_batch_start", "on_train_batch_end")


class StepTimer(Callback):
    """Writes what each training step took, from the end of the one before, and the phases that the module logs.

    With ``--trainer.profiler simple`` also what the Trainer did around the step.

    Args:
        out: JSON file, written when ``fit`` ends.
    """

    def __init__(self, out: str):
        self.out = Path(out)
        self.steps: list[dict[str, float]] = []
        self.last_end: float | None = None

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.last_end = None  # an evaluation lies before this task's first step, which is therefore not timed

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now = perf_counter()
        if self.last_end is not None:
            logged = trainer.callback_metrics.items()
            phases = {n[len("time/") :].removesuffix("_s"): float(v) for n, v in logged if n.startswith("time/")}
            self.steps.append({"step": now - self.last_end, **phases})
        self.last_end = now

    def on_fit_end(self, trainer, pl_module) -> None:
        around = {}
        if isinstance(trainer.profiler, SimpleProfiler):
            durations = trainer.profiler.recorded_durations.items()
            around = {name: mean(times) for name, times in durations if name.endswith(AROUND_THE_STEP)}
        self.out.write_text(json.dumps({"steps": self.steps, "around": around}), encoding="utf-8")
