"""Replay: rows of earlier tasks stand in the batches of later ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cpt_lightning.data.sampler import Passes, RowRef, StageSampler

BUFFER, DRAW, PLACE = 101, 102, 103
"""What a generator of replay is for; tasks and passes, which have the same place in other keys, are counted from 0."""


@dataclass
class Replay:
    """How much of a batch is taken from earlier tasks, and from which of their rows.

    With SFT this is experience replay (Chaudhry et al. 2019, arXiv 1902.10486): old rows with their targets. With RFT
    it is prompt replay: old prompts, of which the policy samples fresh completions.

    From the second stage on ``ratio`` of the rows are old, exactly so over several batches where a batch cannot be
    split like this. Earlier tasks are drawn equally often, each without repeating a row before all were shown. Where
    ``passes`` say how long a stage lasts, it lasts longer, so that its own rows are still all seen.

    Args:
        ratio: Share of the rows of every batch.
        rows_per_task: Rows that are kept of each task, drawn once by the seed; all by default.

    Raises:
        ValueError: A share outside [0, 1), or no row to keep.
    """

    ratio: float = 0.1
    rows_per_task: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"data.replay.ratio={self.ratio} is a share of the batch and must lie in [0, 1)")
        if self.rows_per_task is not None and self.rows_per_task < 1:
            raise ValueError(f"data.replay.rows_per_task={self.rows_per_task} must be at least 1; null keeps all rows")

    def buffer_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Rows that are kept of tasks of such sizes."""
        return {task: min(size, self.rows_per_task or size) for task, size in sizes.items()}


class ReplaySampler(StageSampler):
    """The training batches of a stage, with rows of earlier tasks among its own: a function of the step alone.

    Args:
        replay: How many rows are taken from earlier tasks.
        earlier: Number of training rows of each earlier task.
        task_numbers: Number of each earlier task in the stream, with which its kept rows are drawn.
        **kwargs: Of :class:`StageSampler`; ``key`` begins with the seed.
    """

    def __init__(self, replay: Replay, earlier: dict[str, int], task_numbers: Mapping[str, int], **kwargs) -> None:
        super().__init__(**kwargs)
        self.replay = replay
        self.earlier = earlier
        buffer_sizes = replay.buffer_sizes(earlier)
        self.buffers = {
            task: np.random.default_rng([self.key[0], BUFFER, task_numbers[task]]).permutation(size)[:kept].tolist()
            for (task, size), kept in zip(earlier.items(), buffer_sizes.values(), strict=True)
        }
        self.old_passes = Passes(buffer_sizes, [*self.key, DRAW], "uniform")

    @property
    def identity(self) -> dict:
        """What makes a step mean the same rows, on any number of ranks."""
        replay = {"ratio": self.replay.ratio, "rows_per_task": self.replay.rows_per_task, "earlier": dict(self.earlier)}
        return {**super().identity, "replay": replay}

    def batch(self, step: int) -> list[RowRef]:
        """The rows of a step over all ranks; old ones stand anywhere, so that no rank has all of them."""
        first, end = self._num_old(step), self._num_old(step + 1)
        old = [RowRef(ref.task, self.buffers[ref.task][ref.row]) for ref in self.old_passes.rows(first, end)]
        own = self.passes.rows(step * self.batch_size - first, (step + 1) * self.batch_size - end)
        rows = [*own, *old]
        return [rows[place] for place in np.random.default_rng([*self.key, PLACE, step]).permutation(len(rows))]

    def _num_old(self, num_steps: int) -> int:
        """Old rows of the first batches together."""
        return math.floor(round(num_steps * self.replay.ratio * self.batch_size, 6))
