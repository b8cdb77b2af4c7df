"""What a training step costs: time, tokens, operations, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from cpt_lightning.models.flops import FlopCounter, Flops
from cpt_lightning.types import Batch, Completions, Prompts

if TYPE_CHECKING:
    from cpt_lightning.models.qwen_vl import QwenVL

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}
"""Dense bfloat16 (V100: float16) operations per second by a part of the device's name, from the makers' data sheets."""


class StepAccount:
    """Adds up what the steps of this rank do, and says what that is per second.

    Args:
        peak_flops: Operations per second that the device can do; looked up by its name if not given.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"peak_flops={peak_flops} must be positive, e.g. 989e12 for an H100 in bfloat16")
        self.peak_flops = peak_flops
        self._start: float | None = None
        self._aside_s = 0.0
        self._clear()

    def _clear(self) -> None:
        self._tokens: Tensor | int = 0
        self._rollouts = 0
        self.flops = Flops()
        """Operations of the step so far."""
        self._phases: dict[str, float] = {}

    def add_flops(self, flops: Flops) -> None:
        """Adds operations of the step."""
        self.flops += flops

    def add_tokens(self, prompts: Prompts, completions: Completions) -> None:
        """Adds the tokens that the step learns from, without padding, a prompt once per group."""
        self._tokens += prompts.lengths.sum() + completions.lengths.sum()

    def add_rollouts(self, completions: Completions) -> None:
        """Adds completions that the step samples."""
        self._rollouts += len(completions)

    def add_time(self, phase: str, seconds: float) -> float:
        """Adds seconds that a phase of the step took; what it took so far."""
        self._phases[phase] = self._phases.get(phase, 0.0) + seconds
        return self._phases[phase]

    def pause(self) -> None:
        """What comes until the next step is not training."""
        self._start = None

    def start(self) -> None:
        """A step begins; unless training was paused it began where the last one ended, so that loading counts too."""
        if self._start is None:
            self._start = self.clock()
            self._clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within is no part of the step, nor of one of its phases."""
        start = time.perf_counter()
        yield
        self._aside_s += time.perf_counter() - start

    def clock(self) -> float:
        """Seconds that have passed, but for those that went aside."""
        return time.perf_counter() - self._aside_s

    def end(self, device: torch.device) -> dict[str, Tensor | float]:
        """A step has ended.

        Returns:
            ``time/step_s``; ``perf/rollouts``, completions that were sampled; ``perf/tokens_per_s`` without padding, a
            prompt counted once per group; ``perf/mfu``, the executed operations as a share of the device's peak, and
            ``perf/mfu_equivalent``, those of a naive step, as far as the peak is known; ``perf/host_rss_gb``, and on a
            GPU ``perf/peak_memory_gb`` (1 GB is 10^9 bytes).
        """
        now = self.clock()
        seconds = 0.0 if self._start is None else now - self._start
        measured: dict[str, Tensor | float] = {
            "time/step_s": seconds,
            "perf/rollouts": float(self._rollouts),
            "perf/host_rss_gb": host_rss() / 1e9,
        }
        if seconds > 0:
            measured["perf/tokens_per_s"] = self._tokens / seconds
            if peak := self.peak_flops or peak_flops_of(device):
                measured["perf/mfu"] = self.flops.executed / seconds / peak
                measured["perf/mfu_equivalent"] = self.flops.equivalent / seconds / peak
        if device.type == "cuda":
            measured["perf/peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        self._start = now
        self._clear()
        return measured


class Accounted(L.LightningModule):
    """A module that logs what its training steps cost.

    Args:
        peak_flops: Operations per second that the device can do, for ``perf/mfu``.
    """

    model: QwenVL

    def __init__(self, peak_flops: float | None = None) -> None:
        super().__init__()
        self.account = StepAccount(peak_flops)
        self.on_phase: Callable[[str], None] | None = None
        """Is told what a step is at, while there is a person to see it."""
        self._evaluation_start = 0.0

    @cached_property
    def flops(self) -> FlopCounter:
        """Counts the operations of the model, as it is tuned."""
        return FlopCounter(self.model)

    @property
    def flops_per_batch(self) -> int | None:
        """Operations of the training step that ends, for Lightning's ``ThroughputMonitor``; evaluations count none."""
        return int(self.account.flops.executed) if self.trainer.training else None

    def on_train_epoch_start(self) -> None:
        """An evaluation may lie before the first step of a task."""
        super().on_train_epoch_start()
        self.account.pause()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """A step begins."""
        self.account.start()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Logs what the step cost: ``time/step_s`` and ``perf/*`` of this rank, its rows and rollouts of all ranks."""
        measured = self.account.end(self.device)
        counts = {"perf/rows": float(len(batch)), "perf/rollouts": measured.pop("perf/rollouts")}
        self.log_dict(counts, batch_size=1, sync_dist=True, reduce_fx="sum")
        shown = {"perf/mfu", "perf/peak_memory_gb"}
        for name, value in measured.items():
            self.log(name, value, prog_bar=name in shown, batch_size=1)

    def on_validation_start(self) -> None:
        """An evaluation is no part of a step, if it lies between two."""
        super().on_validation_start()
        self.account.pause()
        self._evaluation_start = time.perf_counter()

    def on_validation_epoch_end(self) -> None:
        """Logs how long an evaluation of the stream took, as ``time/evaluation_s``."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("time/evaluation_s", time.perf_counter() - self._evaluation_start, sync_dist=True)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Logs how long a phase of the step takes, as ``time/<phase>_s``; times of the same phase add up."""
        self.say_phase(phase)
        start = self.account.clock()
        yield
        self.log(f"time/{phase}_s", self.account.add_time(phase, self.account.clock() - start))

    def say_phase(self, phase: str) -> None:
        """Says what the step is at, if somebody wants to know."""
        if self.on_phase is not None:
            self.on_phase(phase)


def peak_flops_of(device: torch.device) -> float | None:
    """What the table says of the device, ``None`` if it does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def host_rss() -> int:
    """Bytes of main memory that this process holds; its highest so far where the system tells no more."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize()
    if sys.platform == "win32":
        return 0
    import resource

    # Kibibytes, on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
