"""Fair timing: every arm in a fresh process, arms in turn, medians and paired ratios; and what memory is needed."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from statistics import median
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch

from cpt_lightning.cli.rehearse.memory import DeviceMemory
from cpt_lightning.modules.accounting import host_rss

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *args: Any, threads: int) -> Result:
    """What ``function`` gives in a new process on so many CPU threads; its exceptions are raised here."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), **quiet)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_silence_lightning) as pool:
        return pool.submit(function, *args).result()


def _silence_lightning() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def in_turn(arms: Mapping[str, Callable[[], dict]], repeats: int) -> dict[str, list[dict]]:
    """The results of every arm, run one after the other in each round, so that a slow hour hits all alike.

    An arm that runs out of the GPU's memory is left out, which is said.
    """
    rounds: dict[str, list[dict]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name in list(rounds):
            try:
                rounds[name].append(arms[name]())
            except torch.OutOfMemoryError as error:
                print(f"{name}: {error}")
                del rounds[name]
    return rounds


def compare(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """The rounds, each arm's medians over them, and how many times the first arm's figures the others' are."""
    (first, ours), *others = rounds.items()
    ratios = {
        f"{arm}/{first}": {figure: paired_ratio(ours, results, figure) for figure in ours[0] if figure in results[0]}
        for arm, results in others
    }
    return {"medians": {arm: medians(results) for arm, results in rounds.items()}, "ratios": ratios, "rounds": rounds}


def medians(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every figure."""
    return {figure: median(result[figure] for result in results) for figure in results[0]}


def paired_ratio(
    ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], figure: str
) -> dict[str, float]:
    """Median, lowest and highest of the ratios within a round."""
    ratios = [their[figure] / our[figure] for our, their in zip(ours, theirs, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def show_ratio(ratio: Mapping[str, float]) -> str:
    """The median, and from where to where."""
    return "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio)


class PeakMemory:
    """The most memory that is needed above what is held when the measuring begins.

    On CUDA allocated memory; on the CPU resident memory, whose high-water mark Linux keeps (proc(5)).
    """

    def __init__(self, device: str) -> None:
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
        self.memory = DeviceMemory(torch.device(device))
        self.memory.forget_peak()
        self.start_bytes = torch.cuda.memory_allocated() if device == "cuda" else host_rss()

    @property
    def bytes(self) -> int:
        """So far; 1 where none was needed, so that there are ratios."""
        return max(1, self.memory.peak - self.start_bytes)


class Stopwatch:
    """Seconds between laps, with the device's work done."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self.lap()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self.is_cuda:
            torch.cuda.synchronize()
        now = perf_counter()
        seconds, self._last = now - getattr(self, "_last", now), now
        return seconds


class StepMeter:
    """Times the phases of a trainer's steps, each from the end of the one before, so that a step is their sum.

    Beside the seconds that pass it counts those that the CPU works, which other work on the machine hardly lengthens.

    Args:
        device: ``cpu`` or ``cuda``.
        warm_up: First steps whose times do not count; their memory does.
    """

    def __init__(self, device: str, warm_up: int) -> None:
        self.warm_up = warm_up
        self.phases: dict[str, list[float]] = {}
        self.cpu_seconds = [process_time()]
        self.memory = PeakMemory(device)
        self.watch = Stopwatch(device)

    def end(self, phase: str) -> None:
        """A phase has ended, and the next one begins."""
        self.phases.setdefault(phase, []).append(self.watch.lap())
        self.cpu_seconds.append(process_time())

    def results(self) -> dict[str, float]:
        """Medians over the steps in seconds, by phase and of whole steps, and the peak memory above the start."""
        timed = {phase: seconds[self.warm_up :] for phase, seconds in self.phases.items()}
        steps = [sum(parts) for parts in zip(*timed.values(), strict=True)]
        ends = self.cpu_seconds[self.warm_up * len(timed) :: len(timed)]
        return {
            **{f"{phase}_s": median(seconds) for phase, seconds in timed.items()},
            "step_s": median(steps),
            "cpu_s": median(end - start for start, end in pairwise(ends)),
            "peak_bytes": self.memory.bytes,
        }
