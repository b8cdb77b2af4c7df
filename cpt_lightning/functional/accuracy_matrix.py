"""What was learned and what was forgotten: the metrics of continual learning, each under one definition.

Common libraries disagree about "forgetting" (first minus last, the last row inside the maximum) and one changes its
caller's lists; here every function states its formula, and none writes into its input. ``accuracy[i][j]`` is the score
on task j after stage i; the untrained base is no row of it but a vector of its own, ``zero_shot[j]``. Unknown entries
are ``None`` or ``nan``; a lower triangle is enough wherever the formula needs no more. What is measured against the
base leaves out tasks and probes that the base was not asked, as where a stream was extended when it was gone.

Stage i teaches task i, unless ``learned_at[j]`` says at which stage task j is learned: in joint training all are at
stage 0. With fewer rows than tasks the stream is under way, and the metrics are about the tasks learned so far. An
average over no task at all is ``nan``: a single task has nothing earlier to forget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

import numpy as np
from torch import Tensor

Scores = Sequence[Any] | Tensor | np.ndarray
"""K numbers, ``None`` or ``nan`` where there is none."""

Accuracy = Sequence[Any] | Tensor | np.ndarray
"""T rows of K scores each; rows may end early, as in a lower triangle."""


def average_accuracy(accuracy: Accuracy, learned_at: Sequence[int] | None = None) -> float:
    """AvgAcc, also "Last" or MFN: the mean of the last row, ``mean_j R[T][j]`` (arXiv 2507.05386).

    Args:
        accuracy: ``[T, K]``.
        learned_at: ``[K]`` stage at which each task is learned; task j at stage j by default.

    Raises:
        ValueError: An entry that the formula needs is missing.

    >>> average_accuracy([[0.9, 0.1], [0.7, 0.8]])
    0.75
    """
    table = _Table(accuracy, learned_at)
    return _mean(table[table.last, task] for task in table.learned_by(table.last))


def learning(accuracy: Accuracy, learned_at: Sequence[int] | None = None) -> float:
    """MFT, what was reached on each task when it had just been learned: ``mean_i R[i][i]``.

    To be shown beside forgetting: who learns nothing forgets nothing.

    Args:
        accuracy: ``[T, K]``.
        learned_at: ``[K]`` stage at which each task is learned; task j at stage j by default.
    """
    table = _Table(accuracy, learned_at)
    return _mean(table[table.learned_at[task], task] for task in table.learned_by(table.last))


def mean_average_accuracy(accuracy: Accuracy, learned_at: Sequence[int] | None = None) -> float:
    """MAA: the mean over stages of the average accuracy over the tasks learned so far, ``mean_i mean_{j<=i} R[i][j]``.

    Args:
        accuracy: ``[T, K]``.
        learned_at: ``[K]`` stage at which each task is learned; task j at stage j by default.
    """
    table = _Table(accuracy, learned_at)
    stages = [stage for stage in range(table.last + 1) if table.learned_by(stage)]
    return _mean(_mean(table[stage, task] for task in table.learned_by(stage)) for stage in stages)


def forgetting_measure(
    accuracy: Accuracy,
    normalizer: Literal["earlier", "all"] = "earlier",
    learned_at: Sequence[int] | None = None,
) -> float:
    """Paper A's FM: final minus best earlier score, averaged over earlier tasks; negative if something was forgotten.

    ``FM = 1/(T-1) * sum_{j<T} (R[T][j] - max_{l<T} R[l][j])`` (arXiv 2507.05386), the negative of Chaudhry's F_T
    (ECCV 2018, eq. 3). The paper does not say what it divides by. The best is that of the scores which are known: of a
    task that was added to the stream later those since then.

    Args:
        accuracy: ``[T, K]``.
        normalizer: ``earlier`` divides by the T-1 tasks learned before the last stage, ``all`` by all T learned.
        learned_at: ``[K]`` stage at which each task is learned; task j at stage j by default.

    Returns:
        At most 0 unless a task ends better than it ever was before; ``nan`` if there is no earlier task.

    >>> round(forgetting_measure([[0.9, 0.1], [0.7, 0.8]]), 3)
    -0.2
    """
    if normalizer not in ("earlier", "all"):
        raise ValueError(f"normalizer={normalizer!r} must be 'earlier' (T-1 tasks) or 'all' (T tasks)")
    table = _Table(accuracy, learned_at)
    changes = table.changes()
    share = 1.0 if normalizer == "earlier" else len(changes) / len(table.learned_by(table.last))
    return share * _mean(changes.values())


def forgetting_by_task(accuracy: Accuracy, learned_at: Sequence[int] | None = None) -> dict[int, float]:
    """The terms whose mean is :func:`forgetting_measure`: each earlier task's final minus its best earlier score.

    Args:
        accuracy: ``[T, K]``.
        learned_at: ``[K]`` stage at which each task is learned; task j at stage j by default.

    Returns:
        By the number of the task; those that are learned in the last stage, or later, are left out.

    >>> {task: round(change, 3) for task, change in forgetting_by_task([[0.9, 0.1], [0.7, 0.8]]).items()}
    {0: -0.2}
    """
    return _Table(accuracy, learned_at).changes()


def backward_transfer(accuracy: Accuracy, learned_at: Sequence[int] | None = None) -> float:
    """BWT of Lopez-Paz and Ranzato (NeurIPS 2017): what later tasks did to the score reached when a task was learned.

    ``BWT = 1/(T-1) * sum_{j<T} (R[T][j] - R[j][j])``.

    Args:
        accuracy: ``[T, K]``.
        learned_at: ``[K]`` stage at which each task is learned; task j at stage j by default.
    """
    table = _Table(accuracy, learned_at)
    return _mean(table[table.last, task] - table[table.learned_at[task], task] for task in table.earlier)


def forward_transfer(accuracy: Accuracy, zero_shot: Scores, learned_at: Sequence[int] | None = None) -> float:
    """FWT of Lopez-Paz and Ranzato (NeurIPS 2017): what earlier tasks did for a task before it was learned itself.

    ``FWT = 1/(T-1) * sum_{j>1} (R[j-1][j] - b_j)``; their b is a randomly initialised model, here the untrained base.
    A task without a b_j is left out of the sum and of the number that divides it.

    Args:
        accuracy: ``[T, K]``.
        zero_shot: ``[K]`` scores of the untrained base.
        learned_at: ``[K]`` stage at which each task is learned; task j at stage j by default.

    >>> forward_transfer([[0.9, 0.5, None], [0.7, 0.8, 0.6], [0.7, 0.8, 0.9]], zero_shot=[0.1, 0.25, None])
    0.25
    """
    table = _Table(accuracy, learned_at)
    base = _numbers(zero_shot)
    later = [task for task in table.learned_by(table.last) if table.learned_at[task] > 0 and not math.isnan(base[task])]
    return _mean(table[table.learned_at[task] - 1, task] - base[task] for task in later)


def worst_dip(accuracy: Accuracy, learned_at: Sequence[int] | None = None) -> float:
    """The deepest that any learned task ever fell below its best score before, later recovery or not; at least 0.

    ``max_{k, j learned before k} max(0, max_{l<k} R[l][j] - R[k][j])``; ``nan`` if there is no earlier task. Needs the
    whole lower triangle.

    Args:
        accuracy: ``[T, K]``.
        learned_at: ``[K]`` stage at which each task is learned; task j at stage j by default.
    """
    table = _Table(accuracy, learned_at)
    dips = [
        max(0.0, table.best_before(stage, task) - table[stage, task])
        for stage in range(1, table.last + 1)
        for task in table.learned_by(stage - 1)
    ]
    return max(dips, default=math.nan)


def probe_changes(probes: Accuracy, zero_shot: Scores) -> list[float]:
    """Retention of general ability: the change of each probe's score from the base to the last stage.

    Args:
        probes: ``[T, K]`` scores of K probes after each stage.
        zero_shot: ``[K]`` scores of the untrained base.

    Returns:
        K differences, negative where ability was lost; ``nan`` of a probe that the base was not asked.

    >>> probe_changes([[0.5, 1.0], [0.75, 1.0]], zero_shot=[1.0, 1.0])
    [-0.25, 0.0]
    """
    base, rows = _numbers(zero_shot), [_numbers(row) for row in probes]
    return [last - first for first, last in zip(base, rows[-1], strict=True)]


def probe_minima(probes: Accuracy) -> list[float]:
    """The lowest score of each probe after any stage: an ability may be gone on the way and back at the end.

    Args:
        probes: ``[T, K]`` scores of K probes after each stage.
    """
    return [min(scores) for scores in zip(*(_numbers(row) for row in probes), strict=True)]


class _Table:
    """A copy of the accuracies that knows which tasks are learned when, and complains about what is missing."""

    def __init__(self, accuracy: Accuracy, learned_at: Sequence[int] | None) -> None:
        self.rows = [_numbers(row) for row in accuracy]
        if not self.rows:
            raise ValueError("accuracy has no rows; there is no metric before the first task is learned")
        num_tasks = max(map(len, self.rows))
        self.learned_at = list(range(num_tasks)) if learned_at is None else list(learned_at)
        if num_tasks > len(self.learned_at):
            raise ValueError(f"accuracy has {num_tasks} columns, but learned_at names {len(self.learned_at)} tasks")
        self.last = len(self.rows) - 1
        if learned_at is None and self.last >= num_tasks:
            raise ValueError(f"accuracy has {len(self.rows)} rows for {num_tasks} tasks; say what is learned_at which")
        self.earlier = self.learned_by(self.last - 1)

    def __getitem__(self, entry: tuple[int, int]) -> float:
        score = self._get(*entry)
        if math.isnan(score):
            raise ValueError(f"accuracy[{entry[0]}][{entry[1]}] is missing, and the metric needs it")
        return score

    def learned_by(self, stage: int) -> list[int]:
        """Tasks learned at ``stage`` or before."""
        return [task for task, at in enumerate(self.learned_at) if at <= stage]

    def best_before(self, stage: int, task: int) -> float:
        """The best score on ``task`` at stages before ``stage``; unknown ones do not count."""
        known = [self._get(row, task) for row in range(stage) if not math.isnan(self._get(row, task))]
        if not known:
            raise ValueError(f"column {task} of accuracy is empty above row {stage}, and the metric needs its best")
        return max(known)

    def changes(self) -> dict[int, float]:
        """Last score on each earlier task minus its best before."""
        return {task: self[self.last, task] - self.best_before(self.last, task) for task in self.earlier}

    def _get(self, stage: int, task: int) -> float:
        row = self.rows[stage]
        return row[task] if task < len(row) else math.nan


def _numbers(row: Scores) -> list[float]:
    return [math.nan if score is None else float(score) for score in row]


def _mean(values) -> float:
    values = list(values)
    return fmean(values) if values else math.nan
