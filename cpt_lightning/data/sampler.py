"""Which rows stand in which batch: a function of (seed, stage, step) alone, so that a run can go on anywhere.

Training draws from an endless sequence of passes over a stage's rows. A pass is a shuffle keyed by (seed, stage, pass);
batches run on across the end of a pass, so that no row is lost and every batch is full. Evaluation goes through all
rows in order. Both hand every rank an equal share of every batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Sampler

Mixing = Literal["size", "uniform"] | float
"""How often the tasks of a mixed stage are drawn: by their number of rows, all alike, or between:
rows^(1/temperature)."""


class RowRef(NamedTuple):
    """A row of the stream; an invalid one only fills up a rank's share of an evaluation batch."""

    task: str
    row: int
    valid: bool = True


class Share(NamedTuple):
    """Which part of every batch is ours."""

    rank: int = 0
    world_size: int = 1


class Passes:
    """An endless sequence of passes over the rows of tasks, each shuffled.

    Args:
        sizes: Number of rows of each task.
        key: What the shuffles depend on.
        mixing: How often each task is drawn, if there are several.
    """

    def __init__(self, sizes: dict[str, int], key: Sequence[int], mixing: Mixing = "size") -> None:
        self.sizes = sizes
        self.key = list(key)
        self.counts = rows_per_pass(list(sizes.values()), mixing)
        self._last: tuple[int, list[RowRef]] = (-1, [])

    def rows(self, start: int, stop: int) -> list[RowRef]:
        """The rows at these places of the sequence."""
        found = []
        for position in range(start, stop):
            number, index = divmod(position, sum(self.counts))
            if number != self._last[0]:
                self._last = number, self.pass_rows(number)
            found.append(self._last[1][index])
        return found

    def pass_rows(self, number: int) -> list[RowRef]:
        """The rows of one pass, shuffled.

        Each task's rows come in an order of their own that runs on from pass to pass: a task that is drawn less than
        once per pass still shows all its rows before it repeats one.
        """
        rows = [
            RowRef(task, row)
            for task_number, (task, count) in enumerate(zip(self.sizes, self.counts, strict=True))
            for row in self._task_rows(task_number, self.sizes[task], number * count, (number + 1) * count)
        ]
        order = self._generator(len(self.sizes), number).permutation(len(rows))
        return [rows[position] for position in order]

    def _task_rows(self, task_number: int, size: int, start: int, stop: int) -> Iterator[int]:
        for round_number in range(start // size, math.ceil(stop / size)):
            order = self._generator(task_number, round_number).permutation(size)
            offset = round_number * size
            yield from order[max(start - offset, 0) : stop - offset].tolist()

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([*self.key, *key])


class StageSampler(Sampler[list[RowRef]]):
    """The training batches of one stage, this rank's share of each, from ``first_step`` on.

    Args:
        sizes: Number of training rows of each task of the stage.
        batch_size: Rows of a batch, over all ranks.
        num_steps: Batches of the stage.
        key: What the shuffles depend on, such as (seed, stage).
        mixing: How often each task is drawn, if there are several.
        share: Which part of every batch is ours.

    Raises:
        ValueError: The batch cannot be split evenly over the ranks.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        batch_size: int,
        num_steps: int,
        key: Sequence[int],
        mixing: Mixing = "size",
        share: Share = Share(),  # noqa: B008 a tuple
    ) -> None:
        if batch_size % share.world_size:
            raise ValueError(
                f"prompts_per_step={batch_size} cannot be split evenly over {share.world_size} ranks; "
                f"make it a multiple of {share.world_size}"
            )
        self.sizes = sizes
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.key = list(key)
        self.mixing = mixing
        self.share = share
        self.first_step = 0
        self.passes = Passes(sizes, key, mixing)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[RowRef]]:
        part = self.batch_size // self.share.world_size
        start = self.share.rank * part
        for step in range(self.first_step, self.num_steps):
            yield self.batch(step)[start : start + part]

    def batch(self, step: int) -> list[RowRef]:
        """The rows of a step, over all ranks."""
        return self.passes.rows(step * self.batch_size, (step + 1) * self.batch_size)

    @property
    def identity(self) -> dict:
        """What makes a step mean the same rows, on any number of ranks."""
        parts = {"sizes": dict(self.sizes), "prompts_per_step": self.batch_size, "mixing": self.mixing}
        return {**parts, "key": self.key, "replay": None}


class EvaluationSampler(Sampler[list[RowRef]]):
    """Evaluation batches: all rows of every task in order, one task per batch, every rank an equal share of each.

    Where a batch does not divide by the ranks, its last row is repeated as invalid filler, so that all ranks make the
    same number of steps on the same tasks and no row counts twice.

    Args:
        sizes: Number of rows of each task.
        batch_size: Rows of a batch, over all ranks; rounded up to a multiple of the ranks.
        share: Which part of every batch is ours.
        first: Row of each task to begin with; 0 by default.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        batch_size: int,
        share: Share = Share(),  # noqa: B008 a tuple
        first: Mapping[str, int] | None = None,
    ) -> None:
        self.sizes = sizes
        self.first = {task: (first or {}).get(task, 0) for task in sizes}
        self.batch_size = math.ceil(batch_size / share.world_size) * share.world_size
        self.share = share

    def __len__(self) -> int:
        return sum(math.ceil((size - self.first[task]) / self.batch_size) for task, size in self.sizes.items())

    def __iter__(self) -> Iterator[list[RowRef]]:
        for task, size in self.sizes.items():
            for start in range(self.first[task], size, self.batch_size):
                yield self._batch(task, range(start, min(start + self.batch_size, size)))

    def _batch(self, task: str, rows: range) -> list[RowRef]:
        rank, world_size = self.share
        part = math.ceil(len(rows) / world_size)
        positions = range(rank * part, (rank + 1) * part)
        return [RowRef(task, rows[min(p, len(rows) - 1)], valid=p < len(rows)) for p in positions]


def num_steps(num_rows: int, batch_size: float, passes: float) -> int:
    """Batches until every row was seen ``passes`` times; the last one is filled up from the next pass.

    >>> num_steps(100, 16, passes=1), num_steps(100, 16, passes=0.5)
    (7, 4)
    """
    return max(1, math.ceil(round(passes * num_rows, 6) / batch_size))


def rows_per_pass(sizes: Sequence[int], mixing: Mixing) -> list[int]:
    """How many rows each task contributes to a pass of as many rows as all tasks have together.

    Args:
        sizes: Rows of each task.
        mixing: ``size``, ``uniform``, or a temperature: shares are proportional to ``size ** (1 / temperature)``, so 1
            is ``size`` and a large one nearly ``uniform`` (as in mT5, arXiv 2010.11934, whose alpha is its inverse).

    >>> rows_per_pass([90, 10], "size"), rows_per_pass([90, 10], "uniform"), rows_per_pass([90, 10], 2.0)
    ([90, 10], [50, 50], [75, 25])
    """
    exponent = {"size": 1.0, "uniform": 0.0}[mixing] if isinstance(mixing, str) else 1 / mixing
    weights = np.asarray(sizes, dtype=float) ** exponent
    shares = weights / weights.sum() * sum(sizes)
    counts = np.floor(shares + 1e-9).astype(int)
    largest_remainders = np.argsort(-(shares - counts), kind="stable")[: sum(sizes) - counts.sum()]
    counts[largest_remainders] += 1
    return counts.tolist()
